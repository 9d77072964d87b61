"""What `compare` is to do: which texts in which role, which starts, and how they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

from loftq_cli import starts
from loftq_cli.commands.compare_rates import LADDER
from loftq_cli.containers import container_names, kind_of, widths
from loftq_cli.containers.base import Container
from loftq_cli.engines.settings import FORMAT, Settings, settings_of
from loftq_cli.errors import UsageError
from loftq_cli.formats import Experts
from loftq_cli.models.spec import DEMO_DIRECTORY
from loftq_cli.models.texts import is_same, require_different
from loftq_cli.options import (
    LARGEST_SEED,
    CompareOptions,
    QuantizeOptions,
    block_sizes,
    choice,
    items,
    learning_rates,
    ranks,
)
from loftq_cli.report.units import listed
from loftq_cli.starts import QLORA, Start

HELDOUT = DEMO_DIRECTORY / "heldout.txt"
DEMO_CALIBRATION = DEMO_DIRECTORY / "calibration.txt"
DEFAULT_SEEDS = 2


@dataclass(frozen=True)
class Texts:
    """Which text has which role."""

    evaluation: Path
    calibration: Path | None
    training: Path | None

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


@dataclass(frozen=True)
class Grid:
    """What weights are rounded to, and where it lies. Not all containers have blocks."""

    container: str
    bits: int
    block_size: int | None
    experts: str | None = None  # None: as the container has it

    @property
    def kind(self) -> type[Container]:
        return kind_of(self.container, self.bits)


@dataclass(frozen=True)
class TrainingPlan:
    """How every start is trained: at which learning rates, to choose its best, and how often."""

    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]


def training_of(asked: CompareOptions) -> TrainingPlan | None:
    """How to train; None where only distances are asked for.

    Raises:
        UsageError: an option of it has no effect, or a value that means nothing.
    """
    if asked.train_steps is None:
        for name in ("train_text", "learning_rate", "seeds"):
            if getattr(asked, name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')} has no effect without steps",
                    hint="add --train-steps 100",
                )
        return None
    if asked.train_text is None:
        raise UsageError(
            "--train-steps has nothing to train on",
            hint="add --train-text FILE: other text of the same kind as --text",
        )
    count = DEFAULT_SEEDS if asked.seeds is None else asked.seeds
    if asked.seed + count - 1 > LARGEST_SEED:
        raise UsageError(f"there are no {count} seeds from {asked.seed} on", hint="--seed 0")
    rates = LADDER if asked.learning_rate is None else learning_rates(asked.learning_rate)
    return TrainingPlan(
        steps=asked.train_steps,
        rates=tuple(rates),
        seeds=tuple(range(asked.seed, asked.seed + count)),
    )


def texts_of(asked: CompareOptions) -> Texts:
    """The text of every role.

    Raises:
        UsageError: two roles have one text.
    """
    training = asked.train_text
    evaluation, calibration = asked.text or HELDOUT, asked.calibration_text
    if calibration is None and asked.model == "demo":
        taken = (evaluation, training)
        if not any(text is not None and is_same(text, DEMO_CALIBRATION) for text in taken):
            calibration = DEMO_CALIBRATION
    require_different(
        {"--text": evaluation, "--calibration-text": calibration, "--train-text": training}
    )
    return Texts(evaluation, calibration, training)


def methods(asked: CompareOptions, texts: Texts) -> list[Settings]:
    """The settings of every method: plain LoRA, then for each grid and rank QLoRA and the rest.

    Raises:
        UsageError: there is no such start, or it lacks a text.
    """
    wanted = _grids(asked, texts)
    if asked.init is None:
        tried = starts.compared(
            with_text=texts.calibration is not None, trained=texts.training is not None
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
        _settings(each, grid, rank, asked, texts)
        for grid, rank, each in product(wanted, every_rank, quantizing)
        # By default a start is left out where there is none; asked for, it is refused.
        if asked.init is not None or not (grid.kind.why_uncalibrated and each.needs_moments)
    ]


def _grids(asked: CompareOptions, texts: Texts) -> list[Grid]:
    """Every combination that there is of bits, containers and block sizes.

    Raises:
        UsageError: there is none, or not the only one that was asked for.
    """
    bits, names = _bits(asked.bits), list(dict.fromkeys(items(asked.container, "--container")))
    for name in names:
        choice(name, "--container", container_names())
    sizes = block_sizes(asked.block_size)
    found: dict[Grid, None] = {}
    refused = None
    experts: list[str | None] = [None]
    if asked.experts is not None:
        named = list(dict.fromkeys(items(asked.experts, "--experts")))
        for each in named:
            choice(each, "--experts", get_args(Experts))
        experts = [*named]
    for number, name, size, kept in product(bits, names, sizes, experts):
        has_blocks = "block_size" in kind_of(name, number).options
        grid = Grid(name, number, size if has_blocks else None, kept)
        try:
            _settings(QLORA, grid, ranks(asked.ranks)[0], asked, texts)
            found[grid] = None
        except UsageError as error:
            refused = error
    if refused is not None and (not found or len(names) == len(sizes) == len(experts) == 1):
        raise refused
    return list(found)


def _require_meaning(
    grids: Sequence[Grid], tried: Sequence[Start], asked: CompareOptions, texts: Texts
) -> None:
    """Refuses options that would have no effect on any of the methods."""
    kinds = {grid.kind for grid in grids}
    known = {name for kind in kinds for name in kind.options}
    given = {
        name for name in FORMAT if str(getattr(asked, name)) != str(getattr(CompareOptions, name))
    }
    if given - known:
        none = listed([f"--{name.replace('_', '-')}" for name in FORMAT if name not in known], "or")
        which = f"--container {asked.container} has"
        if not known:
            which = f"{' and '.join(map(str, _bits(asked.bits)))} bits have"
        raise UsageError(f"{which} no {none}")
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
        if not each.quantizes and texts.training is None:
            raise UsageError(
                f"--init {each.name} has nothing to show without training",
                cause="until it is trained, it is the original model",
                hint="add --train-steps 100 --train-text FILE",
            )
    return found


def _settings(
    start: Start, grid: Grid | None, rank: int, asked: CompareOptions, texts: Texts
) -> Settings:
    """By the rules of `quantize`; what means nothing to a start or a grid is not said to it."""
    known = () if grid is None else grid.kind.options
    unsaid = {*FORMAT} - {*known} | {"bits", "container", "block_size", "experts"}
    if not start.iterates:
        unsaid.add("iterations")
    said = ((name, value) for name, value in vars(asked).items() if name not in unsaid)
    text = texts.calibration if start.needs_moments else None
    changed: dict[str, Any] = {"init": start.name, "calibration_text": text, "rank": rank}
    if grid is not None:
        changed |= {"bits": grid.bits, "container": grid.container, "experts": grid.experts}
        if grid.block_size is not None:
            changed["block_size"] = grid.block_size
    return settings_of(QuantizeOptions.like(said, **changed))
