"""What `compare` is to do: which texts in which role, and which starts with which settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from loftq_cli import starts
from loftq_cli.containers import kind_of, widths
from loftq_cli.engines.settings import Settings, settings_of
from loftq_cli.errors import UsageError
from loftq_cli.models.finetuning import LEARNING_RATE, Schedule
from loftq_cli.models.spec import DEMO_DIRECTORY
from loftq_cli.models.texts import is_same, require_different
from loftq_cli.options import CompareOptions, QuantizeOptions, items, ranks
from loftq_cli.report.units import listed
from loftq_cli.starts import QLORA, Start

HELDOUT = DEMO_DIRECTORY / "heldout.txt"
DEMO_CALIBRATION = DEMO_DIRECTORY / "calibration.txt"


@dataclass(frozen=True)
class Texts:
    """Which text has which role, and how it is trained on."""

    evaluation: Path
    calibration: Path | None
    training: Path | None
    steps: int | None
    learning_rate: float

    @property
    def evaluation_is_built_in(self) -> bool:
        return self.evaluation == HELDOUT

    @property
    def names(self) -> tuple[str, str | None, str | None]:
        """Evaluation, calibration and training, as a reader of the result may know them."""
        built_in = (HELDOUT, DEMO_CALIBRATION)
        each = (self.evaluation, self.calibration, self.training)
        names = ["built-in" if text in built_in else str(text) if text else None for text in each]
        return names[0] or "", names[1], names[2]

    def schedule(self, seed: int) -> Schedule | None:
        return None if self.steps is None else Schedule(self.steps, self.learning_rate, seed)


def texts_of(asked: CompareOptions) -> Texts:
    """The text of every role.

    Raises:
        UsageError: two roles have one text, or training lacks its text or its steps.
    """
    steps, training, rate = asked.train_steps, asked.train_text, asked.learning_rate
    if steps is not None and training is None:
        raise UsageError(
            "--train-steps has nothing to train on",
            hint="add --train-text FILE: other text of the same kind as --text",
        )
    if steps is None and training is not None:
        raise UsageError("--train-text has no effect without steps", hint="add --train-steps 100")
    if rate is not None:
        if steps is None:
            raise UsageError("--learning-rate has no effect here", hint="add --train-steps 100")
        if not (math.isfinite(rate) and rate > 0):
            raise UsageError(
                f"--learning-rate {rate:g} is not above 0",
                hint=f"--learning-rate {LEARNING_RATE:g}",
            )
    evaluation, calibration = asked.text or HELDOUT, asked.calibration_text
    if calibration is None and asked.model == "demo":
        taken = (evaluation, training)
        if not any(text is not None and is_same(text, DEMO_CALIBRATION) for text in taken):
            calibration = DEMO_CALIBRATION
    require_different(
        {"--text": evaluation, "--calibration-text": calibration, "--train-text": training}
    )
    return Texts(evaluation, calibration, training, steps, rate or LEARNING_RATE)


def methods(asked: CompareOptions, texts: Texts) -> list[Settings]:
    """The settings of every method: plain LoRA, then for each bits and rank QLoRA and the rest.

    Raises:
        UsageError: there is no such start, or it lacks a text.
    """
    wanted = _bits(asked.bits)
    if asked.init is None:
        tried = starts.compared(
            with_text=texts.calibration is not None, trained=texts.steps is not None
        )
    else:
        tried = _named(asked.init, texts)
    every_rank = ranks(asked.ranks)
    _require_meaning(wanted, tried, asked, texts)
    plain = [each for each in tried if not each.quantizes]
    quantizing = [QLORA, *(each for each in tried if each.quantizes and each is not QLORA)]
    return [
        _settings(each, None, rank, asked, texts) for each, rank in product(plain, every_rank)
    ] + [
        _settings(each, number, rank, asked, texts)
        for number, rank, each in product(wanted, every_rank, quantizing)
        # By default a start is left out where there is none; asked for, it is refused.
        if asked.init is not None or not (kind_of(number).why_uncalibrated and each.needs_moments)
    ]


def _require_meaning(
    bits: Sequence[int], tried: Sequence[Start], asked: CompareOptions, texts: Texts
) -> None:
    """Refuses options that would have no effect on any of the methods."""
    form = (asked.quant_type, asked.block_size, asked.double_quant)
    kinds = [kind_of(each) for each in bits]
    if form != ("nf4", 64, False) and not any(kind.options for kind in kinds):
        raise UsageError(
            f"{' and '.join(map(str, bits))} bits have no --quant-type, --block-size or "
            "--double-quant"
        )
    if asked.iterations != "auto" and not any(each.iterates for each in tried):
        raise UsageError("--iterations has no effect on these starts", hint="--init loftq")
    calibrated = any(kind.why_uncalibrated is None for kind in kinds)
    sees_text = calibrated and any(each.needs_moments for each in tried)
    if texts.calibration not in (None, DEMO_CALIBRATION) and not sees_text:
        raise UsageError(
            "--calibration-text has no effect on these starts", hint="--init calibrated"
        )


def _bits(text: str) -> list[int]:
    found = list(dict.fromkeys(items(text, "--bits")))
    for each in found:
        if each not in map(str, widths()):
            raise UsageError(
                f"--bits takes {listed(widths())}, not {each!r:.80}", hint="--bits 4,2"
            )
    return [int(each) for each in found]


def _named(text: str, texts: Texts) -> list[Start]:
    names = dict.fromkeys(items(text, "--init"))
    found = [starts.find(name) for name in names]
    for each in found:
        if each.needs_moments and texts.calibration is None:
            raise UsageError(
                f"--init {each.name} has to see what the layers are given",
                hint="add --calibration-text FILE: text like that the model was made for",
            )
        if not each.quantizes and texts.steps is None:
            raise UsageError(
                f"--init {each.name} has nothing to show without training",
                cause="until it is trained, it is the original model",
                hint="add --train-steps 100 --train-text FILE",
            )
    return found


def _settings(
    start: Start, bits: int | None, rank: int, asked: CompareOptions, texts: Texts
) -> Settings:
    """By the rules of `quantize`; what means nothing to a start is not said to it."""
    said = dict(vars(asked))
    for name in (
        *(() if bits and kind_of(bits).options else ("quant_type", "block_size", "double_quant")),
        *(() if start.iterates else ("iterations",)),
    ):
        del said[name]
    text = texts.calibration if start.needs_moments else None
    changed = {"bits": bits, "init": start.name, "calibration_text": text, "rank": rank}
    return settings_of(QuantizeOptions.like(said.items(), **changed))
