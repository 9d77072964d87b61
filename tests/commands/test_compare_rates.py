"""The search for a learning rate, on made-up losses: what is run, what is best, what is marked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest

from loftq_cli.commands.compare_rates import LADDER, Search, ended
from loftq_cli.models.evaluation import Evaluation
from loftq_cli.models.finetuning import Trained

NAN = math.nan
# What held-out windows differ by among themselves; a run adds its own loss to it.
WINDOWS = (-0.3, 0.1, 0.2)


class Contest:
    """Runs whose losses at a quarter and at the end are given for every rate."""

    def __init__(
        self,
        after: Sequence[float],
        quarter: Sequence[float] | None = None,
        noise: Callable[[int, int], float] = lambda index, window: 0.0,
    ) -> None:
        self.after, self.noise = after, noise
        self.quarter = [loss + 1 for loss in after] if quarter is None else quarter
        self.whole: list[int] = []
        self.stopped: list[int] = []
        self.search = Search([10.0 ** -(len(after) - each) for each in range(len(after))])

    def walk(self, begin: int) -> Search:
        return self.search.walk(begin, self.run)

    def run(self, rate: float, goes_on: Callable[[Evaluation], bool]) -> Trained:
        index = self.search.rates.index(rate)
        quarter = self._evaluation(index, self.quarter[index])
        on = goes_on(quarter)
        (self.whole if on else self.stopped).append(index)
        after = self._evaluation(index, self.after[index]) if on else None
        return Trained([], quarter, after, 1.0)

    def _evaluation(self, index: int, loss: float) -> Evaluation:
        noisy = [loss + own + self.noise(index, window) for window, own in enumerate(WINDOWS)]
        return Evaluation(tuple(noisy), None)


@pytest.mark.parametrize("begin", range(7))
@pytest.mark.parametrize("best", range(7))
def test_a_bowl_is_walked_down_to_its_floor(begin: int, best: int) -> None:
    contest = Contest([abs(index - best) / 100 for index in range(7)])
    search = contest.walk(begin)
    assert search.best == best
    assert search.at_end == {0: "lowest", 6: "highest"}.get(best)
    around = {each for each in (best - 1, best, best + 1) if 0 <= each < 7}
    assert around <= set(contest.whole), "the best lies between two that are no better"
    wanted = around | set(range(min(begin, best), max(begin, best) + 1))
    assert set(search.tried) - wanted <= {begin + 1}, "one look up at the most"
    assert len(contest.whole) == len(set(contest.whole)), "nothing twice"


def test_it_goes_on_in_the_direction_that_paid() -> None:
    contest = Contest([5, 4, 3, 2, 1, 2, 3])
    assert list(contest.walk(2).tried) == [2, 3, 4, 5]
    contest = Contest([3, 2, 1, 2, 3, 4, 5])
    assert list(contest.walk(4).tried) == [4, 5, 3, 2, 1]


def test_a_flat_contest_is_left_where_it_began() -> None:
    contest = Contest([2.0] * 7)
    search = contest.walk(3)
    assert (search.best, search.at_end, contest.whole) == (3, None, [3, 4, 2])
    contest = Contest([2.0] * 7)
    search = contest.walk(6)
    assert (search.best, search.at_end, contest.whole) == (6, None, [6, 5])


def test_a_tie_at_the_end_is_no_reason_to_look_beyond_it() -> None:
    """The last rate is lower by 0.001, in windows that differ by twenty times as much."""
    after = [2.0, 1.9, 1.8, 1.7, 1.6, 1.501, 1.5]
    noise = [[0.0, 0.02, 0.04], [0.04, 0.0, 0.02], [0.02, 0.04, 0.0]]
    contest = Contest(after, noise=lambda index, window: noise[index % 3][window])
    search = contest.walk(3)
    assert (search.best, search.at_end) == (6, None), "the lower one is the best all the same"
    # The same in every window: there it is lower.
    assert Contest(after).walk(3).at_end == "highest"
    after = [*after[:5], math.nan, 1.5]
    assert Contest(after).walk(6).at_end == "highest", "nothing beside it to be as good"


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_what_diverges_is_not_best_and_not_walked_past(bad: float) -> None:
    contest = Contest([4, 3, 2, 1, bad, bad, bad], quarter=[5, 4, 3, 2, bad, bad, bad])
    search = contest.walk(2)
    assert (search.best, search.at_end) == (3, None)
    assert contest.stopped == [4], "given up at a quarter"
    assert 5 not in search.tried
    # A number at a quarter and none at the end.
    contest = Contest([4, 3, 2, 1, bad, bad, bad])
    contest.quarter = [2.0] * 7
    search = contest.walk(5)
    assert (search.best, contest.whole) == (3, [5, 4, 3, 2])


def test_where_everything_diverges() -> None:
    contest = Contest([NAN] * 7)
    search = contest.walk(3)
    assert (search.best, search.best_rate, search.at_end) == (None, None, None)
    assert contest.stopped == [3, 2, 1, 0], "only lower rates could help"
    assert not any(ended(run) for run in search.tried.values())


def test_a_rate_far_behind_at_a_quarter_is_given_up() -> None:
    """The best one gains 1.0 after its quarter; half of that may be made up for."""
    after = [2.5, 2.3, 2.0, 2.1, 1.0, 1.0, 1.0]
    contest = Contest(after, quarter=[3.6, 3.49, 3.0, 3.49, 3.9, 9.0, 9.0])
    search = contest.walk(2)
    assert (search.best, contest.whole, contest.stopped) == (2, [2, 3, 1], [])
    contest = Contest(after, quarter=[9, 9, 3.0, 3.51, 3, 3, 3])
    search = contest.walk(2)
    assert (search.best, contest.whole, contest.stopped) == (2, [2], [3, 1])
    assert not ended(search.tried[3])


def test_the_first_run_is_never_given_up() -> None:
    contest = Contest([9.0, 9.0, 9.0], quarter=[100.0, 100.0, 100.0])
    contest.walk(1)
    assert contest.whole == [1, 2, 0]


def test_short_lists() -> None:
    single = Contest([3]).walk(0)
    assert (single.best, single.at_end) == (0, None), "one rate is no ladder"
    for after, best, end in (([3, 1], 1, "highest"), ([1, 3], 0, "lowest"), ([3, 1, 2], 1, None)):
        search = Contest(after).walk(len(after) // 2)
        assert (search.best, search.at_end) == (best, end)
        assert len(search.tried) == len(after)


def test_the_ladder() -> None:
    assert (LADDER[0], LADDER[-1]) == (1e-4, 8e-3)
    assert all(1.9 < high / low < 2.6 for low, high in itertools.pairwise(LADDER))
