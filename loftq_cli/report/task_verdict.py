"""What scores on tasks say of the starts, in sentences that follow from the figures.

A task is judged by its first metric. Starts are asked the same questions, and lm-eval has the
standard error of each one's score alone; a difference counts where it is more than twice what
those come to for two that are asked different questions, which is more than it need be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from loftq_cli import starts
from loftq_cli.formats import DEFAULT_CONTAINER
from loftq_cli.report import units
from loftq_cli.report.start_verdict import ERRORS, grid_of, placed
from loftq_cli.report.stored_bits import called
from loftq_cli.schema import ComparedMethod, CompareVerdict, TaskScore, TaskVerdict


def with_tasks(verdict: CompareVerdict, methods: Sequence[ComparedMethod]) -> CompareVerdict:
    """The verdict on the starts, and what their scores say."""
    found = [*_by_tasks(methods)]
    sentence = " ".join([verdict.sentence, *(each.sentence for each in found)])
    return verdict.model_copy(update={"sentence": sentence, "tasks": found})


def first_scores(method: ComparedMethod, trained: bool = False) -> dict[str, TaskScore]:
    """By task, what it is judged by."""
    found: dict[str, TaskScore] = {}
    for score in method.trained_scores if trained else method.scores:
        found.setdefault(score.task, score)
    return found


def shown(score: TaskScore) -> str:
    """`0.660 ± 0.034`."""
    if score.value is None:
        return "no number"
    error = score.standard_error
    return units.small(score.value) if error is None else f"{score.value:.3f} ± {error:.3f}"


def _by_tasks(methods: Sequence[ComparedMethod]) -> Iterator[TaskVerdict]:
    original = first_scores(methods[0])
    quantized = [each for each in methods if each.rank and starts.of_report(each.init).quantizes]
    grids = dict.fromkeys(map(grid_of, quantized))
    for task, reference in original.items():
        for grid in grids:
            here = [each for each in quantized if grid_of(each) == grid]
            alone = sum(bits == grid[0] for bits, *_ in grids) == 1
            where = f"{grid[0]} bits" if alone else called(here[0].grid, *grid[1:])
            for trained in (False, True):
                scored = [
                    (method, score)
                    for method in here
                    if (score := first_scores(method, trained).get(task))
                    and _goodness(score) is not None
                ]
                if scored:
                    yield _best(scored, reference, where, trained)


def _best(
    scored: Sequence[tuple[ComparedMethod, TaskScore]],
    original: TaskScore,
    where: str,
    trained: bool,
) -> TaskVerdict:
    # Ties go to the one that comes first, which is QLoRA.
    method, best = max(scored, key=lambda each: _goodness(each[1]) or 0.0)
    plain = next(
        (
            score
            for each, score in scored
            if each.init == starts.QLORA.name and each.rank == method.rank
        ),
        None,
    )
    margin = error = gain = None
    if plain is not None and best.value is not None and plain.value is not None:
        margin = abs(best.value - plain.value)
        if best.standard_error is not None and plain.standard_error is not None:
            error = math.hypot(best.standard_error, plain.standard_error)
            gain = margin > ERRORS * error
    name = best.metric if best.filter is None else f"{best.metric}, {best.filter}"
    sentence = f"On {best.task} ({name}), at {where}{' and trained' if trained else ''}, "
    if method.init == starts.QLORA.name:
        sentence += f"no start is better than QLoRA: {shown(best)}"
    else:
        sentence += f"{placed(method)} is best: {shown(best)}"
        if plain is not None:
            beyond = {True: "", False: ", which is within the error", None: ""}[gain]
            sentence += f"; QLoRA has {shown(plain)}{beyond}"
    sentence += "." if trained else f". The original has {shown(original)}."
    assert best.value is not None
    assert method.rank is not None
    return TaskVerdict(
        task=best.task,
        metric=best.metric,
        filter=best.filter,
        trained=trained,
        bits=method.bits,
        container=method.container or DEFAULT_CONTAINER,
        block_size=method.block_size,
        init=method.init,
        rank=method.rank,
        value=best.value,
        margin=margin,
        margin_error=error,
        gain=gain,
        sentence=sentence,
    )


def _goodness(score: TaskScore) -> float | None:
    """More is better; None for what is no number, or does not say which way is better."""
    if score.value is None or score.higher_is_better is None:
        return None
    return score.value if score.higher_is_better else -score.value
