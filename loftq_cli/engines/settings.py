"""What decides the bytes of a run's result, from the options that ask for it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli import asked as options
from loftq_cli.asked import QuantizeOptions
from loftq_cli.containers import container_of
from loftq_cli.containers.base import Container
from loftq_cli.errors import UsageError
from loftq_cli.formats import ALL_LINEAR, BLOCK_SIZES, SCALINGS, QuantType, SvdMethod
from loftq_cli.starts import STARTS, Start, find

if TYPE_CHECKING:
    from loftq_cli.core.steps import Quantizer


@dataclass(frozen=True)
class CalibrationText:
    """The text that the moments come from, told apart from others by its content."""

    sha256: str
    tokens: int  # at most so many of it


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the result. The same settings give the same bytes.

    ``bits`` is what a weight's code tells, and chooses the ``container``; 16 leaves the weights as
    they are. ``leading`` (blocks, bits) says it for the first blocks of the model, ``target_bits``
    for the average of all layers, each of which gets one of the container's widths by what it
    loses. With ``rank_budget`` the ranks differ too, with as many parameters in all as ``rank``
    everywhere would have; ``uniform_rank`` then pads them to the largest.
    """

    bits: int = 4
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
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise UsageError(
                f"no block size {self.block_size}",
                cause="bitsandbytes has kernels for powers of two from 32 to 4096",
                hint="--block-size 64",
            )
        for name, value in (("rank", self.rank), ("iterations", self.iterations)):
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
        return container_of(self.bits, self)

    def quantizer(self, bits: int) -> Quantizer:
        """How a weight becomes codes of so many bits."""
        return self.container.quantizer(bits, search=self.start.searches)

    @property
    def is_measured(self) -> bool:
        """Whether bits or ranks follow from what the layers lose, which has to be seen first."""
        return self.target_bits is not None or self.rank_budget

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "target_modules": list(self.target_modules)}


def settings_of(asked: QuantizeOptions) -> Settings:
    """The settings that these options ask for.

    Raises:
        UsageError: two options contradict each other, or one would have no effect.
    """
    start = find(asked.init)
    if asked.bits is not None and not start.quantizes:
        raise UsageError(f"--init {start.name} does not quantize: no --bits")
    if asked.bits is not None and asked.target_bits is not None:
        raise UsageError("--target-bits chooses the bits: no --bits beside it")
    base, leading = options.bits(asked.bits or 4)
    wanted = options.iterations(asked.iterations)
    _require_format(asked, start, base, leading)
    _require_effect(asked, start, wanted)
    return Settings(
        bits=base if start.quantizes else 16,
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
        seed=asked.seed,
    )


def _require_format(
    asked: QuantizeOptions, start: Start, bits: int, leading: tuple[int, int] | None
) -> None:
    """Refuses number formats that there are not."""
    average = asked.target_bits
    if average is not None and not 2 <= average <= 4:
        raise UsageError("--target-bits takes a number from 2 to 4", hint="--target-bits 2.5")
    fewer = bits < 4 or average is not None or (leading is not None and leading[1] < 4)
    if fewer and asked.quant_type != "nf4":
        raise UsageError(f"{asked.quant_type} has 4 bits only", hint="--quant-type nf4")
    form = (asked.quant_type, asked.block_size, asked.double_quant)
    if bits == 8 and form != ("nf4", 64, False):
        raise UsageError("8 bits have no --quant-type, --block-size or --double-quant")
    if bits == 8 and start.needs_moments:
        raise UsageError(
            f"--init {start.name} is for 4 bits and fewer",
            cause="8-bit layers round the activations too, which no start corrects",
            hint="--bits 4",
        )
    if not start.quantizes and (average, *form) != (None, "nf4", 64, False):
        raise UsageError(f"--init {start.name} does not quantize: no bits and no number format")


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
