"""What decides the bytes of a run's result, from the options that ask for it."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from loftq_cli import hardware, options
from loftq_cli.containers import container_names, container_of, containers, widths
from loftq_cli.containers.base import Container
from loftq_cli.errors import UsageError
from loftq_cli.formats import (
    ALL_LINEAR,
    DEFAULT_CONTAINER,
    DEFAULT_STORAGE,
    SCALINGS,
    AdapterDtype,
    CalibrationOrder,
    Experts,
    QuantType,
    SvdMethod,
)
from loftq_cli.options import QuantizeOptions
from loftq_cli.report.units import listed
from loftq_cli.starts import STARTS, Start, find

if TYPE_CHECKING:
    from loftq_cli.core.steps import Quantizer


KEPT_EXPERT = "an expert, kept as it is by --experts keep"
FORMAT = ("quant_type", "block_size", "double_quant")  # the options of a number format
_FORMAT = (*FORMAT, "quant_storage")  # and of how it lies in files


@dataclass(frozen=True)
class CalibrationText:
    """The text that the moments come from, known by its content."""

    sha256: str
    tokens: int  # at most so many of it


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the result. The same settings give the same bytes.

    ``bits`` is what a weight's code tells, and with ``container_name`` it chooses the
    ``container``; 16 leaves the weights as they are. ``leading`` (blocks, bits) says it for the
    first blocks of the model, ``target_bits`` for the average of all layers, each of which gets one
    of the container's widths by what it loses. A ``block_size`` of -1 is a whole row. With
    ``rank_budget`` the ranks differ too, with as many parameters in all as ``rank`` everywhere
    would have; ``uniform_rank`` then pads them to the largest. ``dtype`` is that of all that is not
    quantized, and of the products with what is; ``quant_storage`` is what the tensors of 4-bit
    codes are called, and ``adapter_dtype`` what A and B are rounded to. ``experts`` is None where
    they are treated as the container has it. ``calibration_order`` says whose activations a
    ``calibration`` sees, ``distill_steps`` how long adapters are trained on its text in the end.
    """

    bits: int = 4
    container_name: str = DEFAULT_CONTAINER
    leading: tuple[int, int] | None = None
    target_bits: float | None = None
    quant_type: QuantType = "nf4"
    block_size: int = 64
    double_quant: bool = False
    init: str = "loftq"  # a name in `starts.STARTS`
    rank: int = 16
    rank_budget: bool = False
    uniform_rank: bool = False
    iterations: int | None = None  # None: until another one hardly pays
    lora_alpha: float = 16
    use_rslora: bool = False
    svd: SvdMethod = "auto"
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    calibration: CalibrationText | None = None
    calibration_order: CalibrationOrder = "parallel"
    distill_steps: int | None = None
    seed: int = 0
    dtype: str | None = None  # None: each tensor's own
    quant_storage: str = DEFAULT_STORAGE
    adapter_dtype: str = "float32"
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if self.svd not in get_args(SvdMethod):
            raise UsageError(f"there is no --svd {self.svd!r:.80}", hint="--svd auto")
        options.choice(self.adapter_dtype, "--adapter-dtype", get_args(AdapterDtype))
        for name, value in (
            ("rank", self.rank),
            ("iterations", self.iterations),
            ("distill-steps", self.distill_steps),
        ):
            if value is not None and type(value) is not int:
                raise UsageError(f"{name} {value!r:.80} is no whole number", hint=f"--{name} 1")
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is too small", hint=f"--{name} 1")
        low, high = SCALINGS
        if not (math.isfinite(self.lora_alpha) and low <= self.scaling <= high):
            raise UsageError(
                f"lora_alpha {self.lora_alpha:g} is out of range",
                cause=f"it must leave a LoRA scaling between {low:g} and {high:g}: "
                "the correction is divided by it",
                hint=f"--lora-alpha {self.rank}",
            )
        container_of(self.container_name, self.bits, self)  # or it refuses the number format

    @property
    def start(self) -> Start:
        return STARTS[self.init]

    @property
    def scaling(self) -> float:
        """s in W ≈ Q + s·B·A."""
        return self.lora_alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    def alpha_of(self, rank: int) -> float:
        """The lora_alpha that gives a layer of this rank the scaling that all have."""
        if rank == self.rank:
            return self.lora_alpha
        return self.scaling * (rank**0.5 if self.use_rslora else rank)

    @property
    def container(self) -> Container:
        """How weights lie in the files, and how they become what lies there."""
        return container_of(self.container_name, self.bits, self)

    def quantizer(self, bits: int) -> Quantizer:
        """How a weight becomes codes of so many bits."""
        return self.container.quantizer(bits, search=self.start.searches)

    @property
    def why_experts_stay(self) -> str | None:
        """Why the matrices of experts are not quantized; None: they are."""
        if self.experts is None:
            return self.container.why_experts_stay
        return None if self.experts == "quantize" else KEPT_EXPERT

    @property
    def is_measured(self) -> bool:
        """Whether bits or ranks follow from what the layers lose, which has to be seen first."""
        return self.target_bits is not None or self.rank_budget

    def as_dict(self) -> dict[str, Any]:
        fields = {**asdict(self), "target_modules": list(self.target_modules)}
        # Runs of versions that knew no other can be finished.
        if self.dtype is None:
            del fields["dtype"]
        if self.container_name == DEFAULT_CONTAINER:
            del fields["container_name"]
        for name in (
            "quant_storage",
            "adapter_dtype",
            "experts",
            "calibration_order",
            "distill_steps",
        ):
            if fields[name] == getattr(Settings, name):
                del fields[name]
        return fields

    def of_base(self) -> dict[str, Any]:
        """What decides Q and the start, whatever container they lie in, and how."""
        fields = {**self.as_dict(), **asdict(self.container)}
        for name in ("container_name", "quant_storage"):
            fields.pop(name, None)
        return fields


def settings_of(asked: QuantizeOptions) -> Settings:
    """The settings that these options ask for.

    Raises:
        UsageError: two options contradict each other, or one would have no effect.
    """
    hardware.require_device_names(asked.device)  # a dry run looks for none
    start = find(asked.init)
    if asked.bits is not None and not start.quantizes:
        raise UsageError(f"--init {start.name} does not quantize: no --bits")
    if asked.bits is not None and asked.target_bits is not None:
        raise UsageError("--target-bits chooses the bits: no --bits beside it")
    options.choice(asked.container, "--container", container_names())
    base, leading = _bits(asked.bits or 4, asked.container)
    wanted = options.iterations(asked.iterations)
    _require_format(asked, start, base, leading)
    _require_effect(asked, start, wanted)
    experts = _experts(asked, start, base)
    return Settings(
        bits=base if start.quantizes else 16,
        container_name=asked.container,
        leading=leading,
        target_bits=asked.target_bits,
        quant_type=asked.quant_type,
        block_size=asked.block_size,
        double_quant=asked.double_quant,
        init=start.name,
        rank=asked.rank,
        rank_budget=asked.rank_budget,
        uniform_rank=asked.uniform_rank,
        iterations=start.default_iterations if wanted is None else wanted,
        lora_alpha=float(asked.rank if asked.lora_alpha is None else asked.lora_alpha),
        use_rslora=asked.rslora,
        svd=asked.svd,
        target_modules=tuple(options.items(asked.target_modules, "--target-modules")),
        calibration=_calibration(start, asked.calibration_text),
        calibration_order=_order(start, asked.calibration_order),
        distill_steps=_distill_steps(start, asked.distill_steps),
        seed=asked.seed,
        dtype=options.dtype(asked.dtype),
        quant_storage=asked.quant_storage,
        adapter_dtype=asked.adapter_dtype,
        experts=experts,
    )


def _require_format(
    asked: QuantizeOptions, start: Start, bits: int, leading: tuple[int, int] | None
) -> None:
    """Refuses number formats that there are not."""
    container, average = container_of(asked.container, bits, asked), asked.target_bits
    wanted = {bits} if leading is None else {bits, leading[1]}
    if average is not None:
        wanted = set(container.all_widths)
        if not min(wanted) <= average <= max(wanted):
            raise UsageError(
                f"--target-bits takes a number from {min(wanted)} to {max(wanted)}",
                hint="--target-bits 2.5",
            )
    if not wanted <= set(container.widths):
        raise UsageError(
            f"{asked.quant_type} has {max(container.widths)} bits only",
            hint=f"--quant-type {container.number_types[0]}",
        )
    given = {name for name in _FORMAT if getattr(asked, name) != getattr(QuantizeOptions, name)}
    if given - set(container.options):
        none = [f"--{each.replace('_', '-')}" for each in _FORMAT if each not in container.options]
        which = (
            f"{bits} bits have" if not container.options else f"--container {container.name} has"
        )
        raise UsageError(f"{which} no {listed(none, 'or')}")
    if start.needs_moments and container.why_uncalibrated is not None:
        raise UsageError(
            f"--init {start.name} is for 4 bits and fewer",
            cause=container.why_uncalibrated,
            hint="--bits 4",
        )
    named = asked.container != DEFAULT_CONTAINER
    if not start.quantizes and (given or named or average is not None):
        raise UsageError(f"--init {start.name} does not quantize: no bits and no number format")


def _experts(asked: QuantizeOptions, start: Start, bits: int) -> Experts | None:
    """What is asked for of experts."""
    if asked.experts is None:
        return None
    options.choice(asked.experts, "--experts", get_args(Experts))
    container = container_of(asked.container, bits, asked)
    if not start.quantizes:
        raise UsageError(f"--init {start.name} does not quantize: no --experts")
    if asked.experts == "quantize" and not container.takes_experts:
        raise UsageError(
            f"nothing loads quantized experts in {container.name} at {bits} bits",
            hint="--container compressed-tensors",
        )
    return asked.experts


def _bits(value: str | int, container: str) -> tuple[int, tuple[int, int] | None]:
    """`4` as (4, None), and `4x8,2` as (2, (8, 4)): 4 bits in the first 8 blocks, then 2."""
    match = re.fullmatch(r"(?:([1-9]\d?)x(\d{1,4}),)?([1-9]\d?)", str(value), re.ASCII)
    found = [] if match is None else [int(each) for each in match.groups() if each]
    named = [each for each in containers() if each.name == container]
    one = any({*found[::2]} <= {*each.all_widths} for each in named)
    if not found or not one:
        raise UsageError(
            f"--bits {str(value)!r:.80} is not supported",
            hint=f"--bits {listed(widths(), 'or')}, or --bits 4x8,2 for 4 bits in the first 8 "
            "blocks and then 2",
        )
    return found[-1], (found[1], found[0]) if len(found) > 1 else None


def _require_effect(asked: QuantizeOptions, start: Start, iterations: int | None) -> None:
    """Refuses options that would have no effect on this start."""
    svd_has_no_effect = asked.svd != "auto" and start.svd != "any"
    if not start.iterates and (iterations is not None or svd_has_no_effect):
        raise UsageError(
            f"--init {start.name} is one decomposition: no --iterations and no --svd"
            if start.corrects
            else f"--init {start.name} corrects nothing: --iterations and --svd have no effect"
        )
    if svd_has_no_effect:
        raise UsageError(f"--init {start.name} has an SVD of its own: no --svd")
    if asked.rank_budget and not start.corrects:
        raise UsageError(f"--init {start.name} corrects nothing: no rank pays more than another")
    if asked.uniform_rank and not asked.rank_budget:
        raise UsageError("all ranks are the same without --rank-budget: no --uniform-rank")


def _calibration(start: Start, text: Path | None) -> CalibrationText | None:
    if not start.needs_moments:
        if text is not None:
            raise UsageError(
                f"--calibration-text has no effect with --init {start.name}",
                hint="--init calibrated",
            )
        return None
    if text is None:
        raise UsageError(
            f"--init {start.name} has to see what the layers are given",
            hint="add --calibration-text FILE: text like that the model was made for",
        )
    from loftq_cli.models.calibration import MOST_TOKENS
    from loftq_cli.models.texts import digest, read_text

    return CalibrationText(digest(read_text(text)), MOST_TOKENS)


def _order(start: Start, asked: CalibrationOrder | None) -> CalibrationOrder:
    if asked is None:
        return "sequential" if start.sequential else "parallel"
    options.choice(asked, "--calibration-order", get_args(CalibrationOrder))
    if not start.sequential:
        raise UsageError(
            f"--calibration-order has no effect with --init {start.name}",
            cause="it is as published, on what the original model gives each layer"
            if start.needs_moments
            else "it looks at no inputs",
            hint="--init calibrated",
        )
    return asked


def _distill_steps(start: Start, asked: int | None) -> int | None:
    if asked is not None and not start.needs_moments:
        raise UsageError(
            f"--distill-steps has no effect with --init {start.name}",
            cause="it trains on the calibration text, and this start takes none",
            hint="--init calibrated --calibration-text FILE",
        )
    return asked
