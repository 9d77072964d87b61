"""All checks of `loftq check`, in their order: of the device, of a model on it, of the main job."""

from __future__ import annotations

from functools import partial

from loftq_cli.checks import kernels, layers, model, rates, roundtrip
from loftq_cli.checks.battery import Check
from loftq_cli.checks.model import Subject
from loftq_cli.checks.roundtrip import RoundTrip

_HARDWARE = (
    (
        "4-bit quantization",
        "codes and scales of every level, border and block edge equal the reference",
        kernels.quantization,
    ),
    (
        "4-bit dequantization",
        "all codes, scales and formats are read as the reference reads them",
        kernels.dequantization,
    ),
    (
        "4-bit layer",
        "its products, forwards and backwards, are those of the dequantized weight",
        layers.four_bit,
    ),
    ("int8 kernel", "codes, scales and values equal the reference", layers.int8),
    (
        "compiled loops",
        "loftq's own fast loops give the reference's codes, scales and residuals",
        kernels.compiled,
    ),
    (
        "integer containers",
        "a small model in both is what was measured, weight by weight",
        roundtrip.integers,
    ),
    (
        "half precision",
        "products in bfloat16 and float16 are right against float64",
        rates.half_precision,
    ),
    (
        "matrix products",
        "products run in every dtype, and how many of them a second",
        rates.matrix_products,
    ),
    ("memory bandwidth", "a large copy arrives whole", rates.memory_bandwidth),
    (
        "SVD",
        "factors are orthonormal, and what they leave is what theory says",
        rates.decomposition,
    ),
)


def hardware_checks(device: str) -> list[Check]:
    return [
        Check(name, "hardware", verifies, partial(body, device))
        for name, verifies, body in _HARDWARE
    ]


def model_checks(subject: Subject) -> list[Check]:
    group = "model"
    loads = "weights and tokenizer load, no parameter is missing, NaN or infinite"
    counts = "trainable parameters counted from the files equal PEFT's on a fresh model"
    writes = "text is written, and a new adapter does not change it"
    costs = "share, reduction and size of the adapter at each rank"
    chooses = "the names of this preset choose the layers that it counts"
    return [
        Check("load", group, loads, partial(model.load, subject)),
        *(
            Check(f"rank {rank}", group, counts, partial(model.rank, subject, rank))
            for rank in model.RANKS
        ),
        Check("generation", group, writes, partial(model.generation, subject), needs=("load",)),
        Check("efficiency", group, costs, partial(model.efficiency, subject)),
        *(
            Check(f"targets {name}", group, chooses, partial(model.targets, subject, name))
            for name in model.TARGETS
        ),
    ]


def main_job_checks(trip: RoundTrip) -> list[Check]:
    group = "main job"
    writes = "every layer is written in 4 bits, and its adapter takes error away"
    reads = "bitsandbytes and PEFT make of the files what was measured"
    return [
        Check("quantize", group, writes, trip.quantize),
        Check("reload", group, reads, trip.reload, needs=("quantize",)),
    ]
