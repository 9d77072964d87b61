"""The main job on this device: quantize into a directory, load that, and measure it again."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.index import Checkpoint, open_checkpoint
from loftq_cli.checks.battery import Finding
from loftq_cli.checks.model import Subject
from loftq_cli.checks.written.residuals import TOLERANCE, loaded_residual
from loftq_cli.containers import containers
from loftq_cli.containers.base import Container, Damaged
from loftq_cli.containers.integers import Integers as IntegerContainer
from loftq_cli.engines.job import Job, make_directory
from loftq_cli.engines.settings import Settings
from loftq_cli.errors import CheckFailed, UnsupportedModel
from loftq_cli.models.architecture import Architecture, read_architecture
from loftq_cli.models.dequantized import IntegerCodes
from loftq_cli.models.generation import continue_text
from loftq_cli.models.loading import LoadedModel, load_model, require_text_model
from loftq_cli.models.source import read_config
from loftq_cli.record import Listener, Record
from loftq_cli.schema import AdaptedLayer

SETTINGS = Settings(rank=8, lora_alpha=16, iterations=2)
# 3 bits in the first block and 2 in the other.
INTEGERS = Settings(
    container_name="gptq", bits=2, leading=(1, 3), block_size=32, rank=4, iterations=1
)
INTEGER_CONTAINERS = tuple(each.name for each in containers() if issubclass(each, IntegerContainer))
_REPORT = "please report it, with this processor's name"


@dataclass
class RoundTrip:
    """The directory that `quantize` writes and `reload` reads; gone when ``files`` is closed."""

    subject: Subject
    files: ExitStack
    output: Path | None = field(default=None, init=False)
    layers: list[AdaptedLayer] = field(default_factory=list, init=False)

    def quantize(self) -> Finding:
        """Every layer to NF4 with a LoftQ adapter, into a temporary directory."""
        subject = self.subject
        subject.loaded = None  # its memory is needed
        temporary = tempfile.TemporaryDirectory(prefix="loftq-check-")
        self.output = Path(self.files.enter_context(temporary)) / "model"
        job = Job(
            str(subject.directory),
            self.output,
            SETTINGS,
            device=subject.device,
            trust_remote_code=subject.trust_remote_code,
        )
        # The battery's own bar is the only one.
        made = make_directory(job, Record("quantize", ["loftq", "quantize"], Listener()))
        if made.on_cpu:  # a finding here, not a detail
            raise CheckFailed(
                f"{made.on_cpu[0]} does not fit on {made.device}: computed on the CPU",
                hint="choose --device cpu, or free memory on the device",
            )
        results = made.document.results
        self.layers = layers = results.layers
        before, after = (
            sum(getattr(each, key) for each in layers) / len(layers)
            for key in ("quantized_only_error_relative", "weight_error_relative")
        )
        worse = [
            each.name
            for each in layers
            if (each.weight_error_relative or 0) > (each.quantized_only_error_relative or 0)
        ]
        if worse:
            raise CheckFailed(
                f"LoftQ leaves {len(worse)} layers worse than plain quantization",
                cause=f"the first is {worse[0]}; the SVD of this device does not do its part",
            )
        return Finding(
            f"{len(layers)} layers; mean error {100 * before:.3g} % quantized, "
            f"{100 * after:.3g} % with the adapter",
            {
                "layers": len(layers),
                "quantized_only_error_relative": before,
                "weight_error_relative": after,
                "input_bytes": subject.checkpoint.total_bytes,
                "output_bytes": results.totals.output_bytes,
                "rank": SETTINGS.rank,
                "iterations": SETTINGS.iterations,
            },
        )

    def reload(self) -> Finding:
        """The written directory through transformers, bitsandbytes and PEFT."""
        subject = self.subject
        assert self.output is not None
        loaded = load_model(
            self.output,
            device=subject.device,
            dtype=subject.dtype,
            trust_remote_code=subject.trust_remote_code,
        )
        architecture = subject.on_meta()
        largest = _largest_gap(
            loaded, SETTINGS.container, subject.checkpoint, architecture, self.layers
        )
        wrote = ""
        try:
            require_text_model(loaded)
        except UnsupportedModel:
            pass
        else:
            continue_text(loaded, "def", 4)
            wrote = "; it writes text"
        return Finding(
            f"residuals of {len(self.layers)} layers from the files equal the report's to "
            f"{largest:.0e}{wrote}",
            {"layers": len(self.layers), "largest_difference": largest},
        )


def integers(device: str) -> Finding:
    """A small model through both containers of integers, with two widths in each."""
    import torch

    models: list[LoadedModel] = []
    largest, count = 0.0, 0
    with tempfile.TemporaryDirectory(prefix="loftq-check-") as scratch:
        source = Path(scratch) / "source"
        small_model().save_pretrained(source)
        checkpoint, config = open_checkpoint(source), read_config(source)
        for name in INTEGER_CONTAINERS:
            output = Path(scratch) / name
            job = Job(str(source), output, replace(INTEGERS, container_name=name), device=device)
            made = make_directory(job, Record("quantize", ["loftq", "quantize"], Listener()))
            loaded = load_model(output, device=device, dtype="float32")
            if loaded.codes is None:
                raise CheckFailed(f"{name} is not written as it is read", hint=_REPORT)
            count += _read_as_the_reference(loaded.codes, open_checkpoint(output), device)
            architecture = read_architecture(source, config, trust_remote_code=False)
            layers = made.document.results.layers
            gap = _largest_gap(loaded, None, checkpoint, architecture, layers)
            largest = max(largest, gap)
            models.append(loaded)
        first, *others = (each.model.state_dict() for each in models)
        for name, weight in first.items():
            if not all(torch.equal(other[name], weight) for other in others):
                raise CheckFailed(
                    f"{name} differs from one container of integers to the other", hint=_REPORT
                )
    return Finding(
        f"{count:,} weights in {' and '.join(INTEGER_CONTAINERS)} are the reference's, and the "
        f"same in both; residuals equal the report's to {largest:.0e}",
        {"values_compared": count, "largest_difference": largest},
    )


def small_model() -> Any:
    """A Llama of two blocks, of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def _read_as_the_reference(codes: IntegerCodes, checkpoint: Checkpoint, device: str) -> int:
    """The number of weights that the container makes the same of as the reference does."""
    import torch

    container, count = codes.container, 0
    for weight in codes.weights:
        try:
            stored = container.read(checkpoint.tensors, weight, device)
            container.require_codes(stored)
        except Damaged as error:
            raise CheckFailed(
                f"{weight.module} is not stored as {container.name} has it", cause=str(error)
            ) from None
        expected = container.quantizer(weight.bits).dequantize(container.quantized(stored))
        if not torch.equal(container.runtime(stored), expected):
            raise CheckFailed(
                f"{container.name} makes other weights of {weight.module} than the reference",
                hint=_REPORT,
            )
        count += expected.numel()
    return count


def _largest_gap(
    loaded: LoadedModel,
    container: Container | None,
    checkpoint: Checkpoint,
    architecture: Architecture,
    layers: Sequence[AdaptedLayer],
) -> float:
    """Between the residuals of a loaded model's layers and those of the report, if it is small."""
    originals = {each.module: each for each in architecture.inventory(checkpoint.infos).layers}
    largest = 0.0
    for layer in layers:
        found, plain = loaded_residual(loaded.model, container, checkpoint, originals[layer.name])
        reported = layer.weight_error_relative or 0.0
        gap = abs(found - reported)
        largest = max(largest, gap)
        if not gap <= TOLERANCE:
            raise CheckFailed(
                f"{layer.name} is not what quantize measured",
                cause=f"its residual is {found:.6f} by the files, and {reported:.6f} "
                f"was reported; without the adapter it is {plain:.6f}",
                hint="pip install -U bitsandbytes peft transformers",
            )
    return largest
