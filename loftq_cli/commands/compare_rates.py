"""Which learning rate trains a start best, found in as few runs as will do.

Losses are means over held-out windows that are the same in every run, so that two runs are told
apart by the differences in single windows. The lower mean is the better rate, however little that
says; at an end of the rates it is marked where it is lower beyond what windows differ by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from loftq_cli.models.evaluation import Evaluation
from loftq_cli.models.finetuning import Trained
from loftq_cli.report.start_verdict import is_below

# Factors of two, as far as round figures allow.
LADDER = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
# At a quarter of the steps a run is hopeless that is behind by more than this share of what the
# best one gained after its own quarter. A rate that is rather high catches up while it decays: on
# the built-in model one that was behind by 0.31 of it ended lower.
HOPELESS_SHARE = 0.5

# Given what the model makes of the held-out windows at a quarter of the steps.
GoesOn: TypeAlias = Callable[[Evaluation], bool]
# Trains at a rate.
Train: TypeAlias = Callable[[float, GoesOn], Trained]


@dataclass
class Search:
    """Runs at several rates of an ascending list, from the same start."""

    rates: Sequence[float]
    tried: dict[int, Trained] = field(default_factory=dict)
    best: int | None = None

    @property
    def best_rate(self) -> float | None:
        """None where no run came to an end with a number."""
        return None if self.best is None else self.rates[self.best]

    @property
    def at_end(self) -> Literal["lowest", "highest"] | None:
        """Which end of the rates the best is at, where one beyond it may be better.

        It may not where its neighbour does as well, within twice the standard error.
        """
        last = len(self.rates) - 1
        if self.best is None or last == 0 or self.best not in (0, last):
            return None
        inside = self.tried.get(1 if self.best == 0 else last - 1)
        if inside is not None and ended(inside):
            best = self.tried[self.best]
            if not is_below(_after(best).window_losses, _after(inside).window_losses):
                return None
        return "lowest" if self.best == 0 else "highest"

    def walk(self, begin: int, train: Train) -> Search:
        """From one rate to the next, until both neighbours of the best are known to be no better.

        What diverged is followed by lower rates only. ``train`` is not kept: it holds a model.
        """
        here, upward = begin, True
        self._try(here, train)
        while (after := self._next(here, upward)) is not None:
            self._try(after, train)
            if self.best == after or self.best is None:
                here, upward = after, after > here
        return self

    def _next(self, here: int, upward: bool) -> int | None:
        around = [here + 1, here - 1] if upward else [here - 1, here + 1]
        if self.best is None:
            around = [here - 1]
        new = (each for each in around if 0 <= each < len(self.rates) and each not in self.tried)
        return next(new, None)

    def _try(self, index: int, train: Train) -> None:
        found = self.tried[index] = train(self.rates[index], self._is_hopeful)
        if ended(found) and (
            self.best is None or _after(found).loss < _after(self.tried[self.best]).loss
        ):
            self.best = index

    def _is_hopeful(self, quarter: Evaluation) -> bool:
        if not math.isfinite(quarter.loss):
            return False
        if self.best is None:
            return True
        best = self.tried[self.best]
        gained = max(0.0, best.quarter.loss - _after(best).loss)
        return quarter.loss - best.quarter.loss <= HOPELESS_SHARE * gained


def ended(run: Trained) -> bool:
    """Whether all steps were taken, and the loss is a number after them."""
    return run.after is not None and math.isfinite(run.after.loss)


def _after(run: Trained) -> Evaluation:
    assert run.after is not None
    return run.after
