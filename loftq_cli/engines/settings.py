"""What decides the bytes of a run's result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loftq_cli.containers import container_of
from loftq_cli.containers.base import Container
from loftq_cli.errors import UsageError
from loftq_cli.formats import ALL_LINEAR, BLOCK_SIZES, SCALINGS, QuantType, SvdMethod
from loftq_cli.starts import STARTS, Start

if TYPE_CHECKING:
    from loftq_cli.core.quantizers import Quantizer


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
