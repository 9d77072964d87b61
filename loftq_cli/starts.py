"""The starts: how backbone and adapter begin. One row each; everything else reads its traits.

To add one, write its function in ``core`` and a row here. The function is called as

    function(W=…, quantizer=…, rank=…, scaling=…, adapter_dtype=…, seed=…,
             **what the row's traits say)

on the weight ``W`` (out × in) and returns a ``core.loftq.LoftqResult``. The option ``--init``, its
help, the settings, estimates, reports and the starts that `compare` tries follow from the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import Any, Literal

from loftq_cli.errors import UsageError


@dataclass(frozen=True)
class Start:
    """One start. The defaults are those of a start that corrects by alternating."""

    name: str
    label: str  # in a verdict's sentences
    sentence: str  # to go on from "the adapter ..."
    # To go on from the name in `--help`; starts that need moments are told together there.
    help: str = ""
    # "module:function" and arguments of its own; without one the weights stay as they are.
    function: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    corrects: bool = True  # the adapter's product is more than zero
    searches: bool = True  # for the absmax; else it is a block's largest magnitude
    # Whether the second moments of the layer's inputs are handed over (``input_moments``, in × in);
    # they come from a calibration text. Such a start chooses the codes of layers without an
    # adapter too, at rank 0; the others leave those to plain quantization.
    needs_moments: bool = False
    # Whether it also takes the inputs that quantized layers leave (``drift``), and does so unless
    # asked otherwise.
    sequential: bool = False
    iterates: bool = True  # ``iterations`` is handed over; None is until another hardly pays
    default_iterations: int | None = None
    # Handed over as ``svd``: what --svd says, or always "exact". "own": nothing is.
    svd: Literal["any", "exact", "own"] = "any"
    compared: bool = True  # by `compare`, without being asked for
    # Up to so many bits half of plain LoRA's learning rate trains it best. Measured by `compare` on
    # the built-in model at rank 8, 4 and 2 bits, rates a factor of two apart (see the README).
    half_rate_up_to: int = 0

    @property
    def quantizes(self) -> bool:
        return self.function is not None

    def load(self) -> Callable[..., Any]:
        """The function; importing it may import torch."""
        assert self.function is not None
        module, _, name = self.function.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found


_LOFTQ = "loftq_cli.core.loftq:initialize"
_CALIBRATED = "loftq_cli.core.calibrated:initialize_calibrated"

# What others are measured against.
QLORA = Start(
    "qlora",
    "QLoRA",
    "corrects nothing yet (QLoRA): the weights are plainly quantized, and its product is zero",
    "corrects nothing",
    _LOFTQ,
    {"iterations": 0},
    corrects=False,
    searches=False,
    iterates=False,
    svd="own",
)
PUBLISHED = Start(
    "loftq-plain",
    "LoftQ as published",
    "starts as published for LoftQ: plain quantization and an exact SVD of what it loses, in turns",
    "does it as published",
    _LOFTQ,
    searches=False,
    # As PEFT's documentation has it, and most who publish figures of LoftQ.
    default_iterations=5,
    svd="exact",
)
LORA = Start(
    "lora",
    "16-bit LoRA",
    "changes nothing yet (LoRA): its product is zero",
    "does not quantize",
    corrects=False,
    iterates=False,
    svd="own",
)
CALIBRATED = Start(
    "calibrated",
    "calibrated",
    "has a calibrated start: codes and adapter were chosen in turns to leave the least error "
    "in the layers' outputs on the calibration text",
    function=_CALIBRATED,
    arguments={"method": "calibrated"},
    needs_moments=True,
    sequential=True,
    svd="own",
    half_rate_up_to=4,
)

_ROWS = (
    Start(
        "loftq",
        "loftq",
        "starts as LoftQ does: codes and adapter were chosen in turns to leave the least error in "
        "the weights, with a scale searched for each block",
        "corrects the quantization error",
        _LOFTQ,
        half_rate_up_to=2,
    ),
    PUBLISHED,
    QLORA,
    LORA,
    Start(
        "pissa",
        "pissa",
        "starts from the weight's own largest singular directions (PiSSA); what they leave was "
        "quantized, and both were refined in turns",
        "begins with the weight's own low rank",
        _LOFTQ,
        {"start": "weight"},
        half_rate_up_to=4,
    ),
    Start(
        "qera",
        "qera",
        "starts as QERA does: for codes that were rounded without it, it is the correction that "
        "leaves the least error in the layers' outputs on the calibration text",
        function=_CALIBRATED,
        arguments={"method": "qera"},
        needs_moments=True,
        iterates=False,
        svd="own",
    ),
    Start(
        "qera-diagonal",
        "qera-diagonal",
        "starts as QERA does in its approximation: the correction that would leave the least "
        "error in the layers' outputs if their inputs were uncorrelated",
        function=_CALIBRATED,
        arguments={"method": "qera-diagonal"},
        needs_moments=True,
        iterates=False,
        svd="own",
        compared=False,
    ),
    CALIBRATED,
)
STARTS: Mapping[str, Start] = {row.name: row for row in _ROWS}


def find(name: str) -> Start:
    """The start of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in STARTS:
        raise UsageError(f"there is no start {name!r:.80}", hint=f"--init {','.join(STARTS)}")
    return STARTS[name]


def of_report(name: str) -> Start:
    """The start that a report names. Of one that this version does not know, that is all."""
    return STARTS.get(name) or Start(name, name, "has a start")


def compared(*, with_text: bool, trained: bool) -> list[Start]:
    """What `compare` tries unless asked, those that do least first: ties go to the simplest.

    Without training, a start that does not quantize is the original model.
    """
    rows = [
        row
        for row in STARTS.values()
        if row.compared and (row.quantizes or trained) and (with_text or not row.needs_moments)
    ]
    return sorted(
        rows, key=lambda row: (row.quantizes, row.needs_moments, row.corrects + row.searches)
    )


def help_text() -> str:
    """What `--help` says of all starts."""
    rows = sorted(STARTS.values(), key=lambda row: not row.corrects)
    each = [f"{row.name} {row.help}" for row in rows if not row.needs_moments]
    *first, last = sorted(row.name for row in rows if row.needs_moments)
    each.append(
        f"{', '.join(first)} and {last} look at what the layers are given for --calibration-text."
    )
    return f"How backbone and adapter start: {'; '.join(each)}"
