"""What `compare` is to do: which texts in which role, and which starts with which settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import cast, get_args

from loftq_cli.commands import options
from loftq_cli.commands.quantize_settings import settings_of
from loftq_cli.engines.plan import CALIBRATED_INITS, UNCORRECTED_INITS, Init, Settings
from loftq_cli.errors import UsageError
from loftq_cli.models.finetuning import LEARNING_RATE, Training
from loftq_cli.models.spec import DEMO_DIRECTORY
from loftq_cli.models.texts import is_same, require_different

HELDOUT = DEMO_DIRECTORY / "heldout.txt"
DEMO_CALIBRATION = DEMO_DIRECTORY / "calibration.txt"
BITS = ("2", "3", "4", "8")
# Without --init: what needs no text, then what does. QLoRA comes first: ties go to the simplest.
_NEED_NO_TEXT: tuple[Init, ...] = ("qlora", "loftq-plain", "loftq", "pissa")
_NEED_TEXT: tuple[Init, ...] = ("qera", "calibrated")


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

    def schedule(self, seed: int) -> Training | None:
        return None if self.steps is None else Training(self.steps, self.learning_rate, seed)


@dataclass(frozen=True)
class Asked:
    """What the command line says of all methods."""

    quant_type: options.QuantTypeName
    block_size: int
    double_quant: bool
    iterations: str
    lora_alpha: float | None
    rslora: bool
    target_modules: str
    seed: int


def texts_of(
    model: str,
    evaluation: Path | None,
    calibration: Path | None,
    training: Path | None,
    steps: int | None,
    learning_rate: float | None,
) -> Texts:
    """The text of every role.

    Raises:
        UsageError: two roles have one text, or training lacks its text or its steps.
    """
    if steps is not None and training is None:
        raise UsageError(
            "--train-steps has nothing to train on",
            hint="add --train-text FILE: other text of the same kind as --text",
        )
    if steps is None and training is not None:
        raise UsageError("--train-text has no effect without steps", hint="add --train-steps 100")
    if learning_rate is not None:
        if steps is None:
            raise UsageError("--learning-rate has no effect here", hint="add --train-steps 100")
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise UsageError(
                f"--learning-rate {learning_rate:g} is not above 0",
                hint=f"--learning-rate {LEARNING_RATE:g}",
            )
    evaluation = evaluation or HELDOUT
    if calibration is None and model == "demo":
        taken = (evaluation, training)
        if not any(text is not None and is_same(text, DEMO_CALIBRATION) for text in taken):
            calibration = DEMO_CALIBRATION
    require_different(
        {"--text": evaluation, "--calibration-text": calibration, "--train-text": training}
    )
    return Texts(evaluation, calibration, training, steps, learning_rate or LEARNING_RATE)


def methods(init: str | None, bits: str, ranks: str, asked: Asked, texts: Texts) -> list[Settings]:
    """The settings of every method: plain LoRA, then for each bits and rank QLoRA and the rest.

    Raises:
        UsageError: there is no such start, or it lacks a text.
    """
    wanted = _bits(bits)
    inits = _named(init, texts) if init is not None else _default(texts)
    every_rank = options.ranks(ranks)
    _require_meaning(wanted, inits, asked, texts)
    plain = [_settings("lora", "4", rank, asked, texts) for rank in every_rank if "lora" in inits]
    quantizing = ["qlora", *(each for each in inits if each not in UNCORRECTED_INITS)]
    return plain + [
        _settings(cast(Init, each), number, rank, asked, texts)
        for number, rank, each in product(wanted, every_rank, quantizing)
        # By default a start is left out where there is none; asked for, it is refused.
        if init is not None or number != "8" or each not in CALIBRATED_INITS
    ]


def _require_meaning(bits: Sequence[str], inits: Sequence[str], asked: Asked, texts: Texts) -> None:
    """Refuses options that would have no effect on any of the methods."""
    form = (asked.quant_type, asked.block_size, asked.double_quant)
    if set(bits) == {"8"} and form != ("nf4", 64, False):
        raise UsageError("8 bits have no --quant-type, --block-size or --double-quant")
    if asked.iterations != "auto" and not any(map(_alternates, inits)):
        raise UsageError("--iterations has no effect on these starts", hint="--init loftq")
    calibrated = set(bits) != {"8"} and any(each in CALIBRATED_INITS for each in inits)
    if texts.calibration not in (None, DEMO_CALIBRATION) and not calibrated:
        raise UsageError(
            "--calibration-text has no effect on these starts", hint="--init calibrated"
        )


def _alternates(init: str) -> bool:
    return init not in UNCORRECTED_INITS and not init.startswith("qera")


def _bits(text: str) -> list[str]:
    found = list(dict.fromkeys(options.split_list(text, "--bits")))
    for each in found:
        if each not in BITS:
            raise UsageError(f"--bits takes 2, 3, 4 and 8, not {each!r:.80}", hint="--bits 4,2")
    return found


def _named(text: str, texts: Texts) -> list[str]:
    found = list(dict.fromkeys(options.split_list(text, "--init")))
    for each in found:
        if each not in get_args(Init):
            raise UsageError(
                f"there is no start {each!r:.80}", hint=f"--init {','.join(get_args(Init))}"
            )
        if each in CALIBRATED_INITS and texts.calibration is None:
            raise UsageError(
                f"--init {each} has to see what the layers are given",
                hint="add --calibration-text FILE: text like that the model was made for",
            )
    if "lora" in found and texts.steps is None:
        raise UsageError(
            "--init lora has nothing to show without training",
            cause="until it is trained, it is the original model",
            hint="add --train-steps 100 --train-text FILE",
        )
    return found


def _default(texts: Texts) -> Sequence[str]:
    trained: tuple[Init, ...] = () if texts.steps is None else ("lora",)
    calibrated = () if texts.calibration is None else _NEED_TEXT
    return [*trained, *_NEED_NO_TEXT, *calibrated]


def _settings(init: Init, bits: str, rank: int, asked: Asked, texts: Texts) -> Settings:
    """By the rules of `quantize`; what means nothing to a start is not said to it."""
    in_blocks = init != "lora" and bits != "8"
    return settings_of(
        bits=None if init == "lora" else bits,
        init=init,
        quant_type=asked.quant_type if in_blocks else "nf4",
        block_size=asked.block_size if in_blocks else 64,
        double_quant=asked.double_quant and in_blocks,
        calibration_text=texts.calibration if init in CALIBRATED_INITS else None,
        rank=rank,
        iterations=asked.iterations if _alternates(init) else "auto",
        lora_alpha=asked.lora_alpha,
        rslora=asked.rslora,
        target_modules=asked.target_modules,
        seed=asked.seed,
    )
