"""From options to the settings of a run. An option that would have no effect is refused."""

from __future__ import annotations

from pathlib import Path

from loftq_cli.commands import options
from loftq_cli.engines.settings import CalibrationText, Settings
from loftq_cli.errors import UsageError
from loftq_cli.formats import ALL_LINEAR, QuantType, SvdMethod
from loftq_cli.starts import Start, find


def settings_of(
    *,
    bits: str | None = None,
    target_bits: float | None = None,
    quant_type: QuantType = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
    init: str = "loftq",
    calibration_text: Path | None = None,
    rank: int = 16,
    rank_budget: bool = False,
    uniform_rank: bool = False,
    iterations: str = "auto",
    svd: SvdMethod = "auto",
    lora_alpha: float | None = None,
    rslora: bool = False,
    target_modules: str = ALL_LINEAR,
    seed: int = 0,
) -> Settings:
    """The settings that these options ask for.

    Raises:
        UsageError: two options contradict each other, or one would have no effect.
    """
    start = find(init)
    if bits is not None and not start.quantizes:
        raise UsageError(f"--init {init} does not quantize: no --bits")
    if bits is not None and target_bits is not None:
        raise UsageError("--target-bits chooses the bits: no --bits beside it")
    base, leading = options.bits(bits or "4")
    wanted = options.iterations(iterations)
    _require_meaning(base, leading, target_bits, quant_type, block_size, double_quant, start)
    svd_has_no_effect = svd != "auto" and start.svd != "any"
    if not start.iterates and (wanted is not None or svd_has_no_effect):
        raise UsageError(
            f"--init {init} is one decomposition: no --iterations and no --svd"
            if start.corrects
            else f"--init {init} corrects nothing: --iterations and --svd have no effect"
        )
    if svd_has_no_effect:
        raise UsageError(f"--init {init} has an SVD of its own: no --svd")
    if rank_budget and not start.corrects:
        raise UsageError(f"--init {init} corrects nothing: no rank pays more than another")
    if uniform_rank and not rank_budget:
        raise UsageError("all ranks are the same without --rank-budget: no --uniform-rank")
    return Settings(
        bits=base if start.quantizes else 16,
        leading=leading,
        target_bits=target_bits,
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        init=init,
        rank=rank,
        rank_budget=rank_budget,
        uniform_rank=uniform_rank,
        iterations=start.default_iterations if wanted is None else wanted,
        lora_alpha=float(rank) if lora_alpha is None else lora_alpha,
        use_rslora=rslora,
        svd=svd,
        target_modules=tuple(options.split_list(target_modules, "--target-modules")),
        calibration=_calibration(start, calibration_text),
        seed=seed,
    )


def _require_meaning(
    bits: int,
    leading: tuple[int, int] | None,
    target_bits: float | None,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    start: Start,
) -> None:
    """Refuses number formats that there are not."""
    if target_bits is not None and not 2 <= target_bits <= 4:
        raise UsageError("--target-bits takes a number from 2 to 4", hint="--target-bits 2.5")
    fewer = bits < 4 or target_bits is not None or (leading is not None and leading[1] < 4)
    if fewer and quant_type != "nf4":
        raise UsageError(f"{quant_type} has 4 bits only", hint="--quant-type nf4")
    form = (quant_type, block_size, double_quant)
    if bits == 8 and form != ("nf4", 64, False):
        raise UsageError("8 bits have no --quant-type, --block-size or --double-quant")
    if bits == 8 and start.needs_moments:
        raise UsageError(
            f"--init {start.name} is for 4 bits and fewer",
            cause="8-bit layers round the activations too, which no start corrects",
            hint="--bits 4",
        )
    if not start.quantizes and (target_bits, *form) != (None, "nf4", 64, False):
        raise UsageError(f"--init {start.name} does not quantize: no bits and no number format")


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
