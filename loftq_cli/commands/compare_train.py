"""The fine-tunes of a start: at several learning rates, then at the best with more seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_cli import schema
from loftq_cli.commands.compare_plan import TrainingPlan
from loftq_cli.commands.compare_rates import GoesOn, Search, ended
from loftq_cli.models.evaluation import Evaluation, finite
from loftq_cli.models.finetuning import BATCH, Schedule, Trained, finetune, training_arguments
from loftq_cli.report import units

if TYPE_CHECKING:
    from torch import Tensor

# Full runs that a walk takes as a rule: the best rate, its neighbours, and the way.
_USUAL_WALK = 3.5
# A step's forward and backward pass, in forward passes: weights get no gradient, activations do.
_PASSES = 3

Tell = Callable[[str], None]


class Trainee:
    """A model whose adapter is trained again and again from where it began."""

    def __init__(self, model: Any, windows: Tensor, heldout: Tensor) -> None:
        self.model, self._windows, self._heldout = model, windows, heldout
        self._beginning = self.adapter()

    def train(
        self,
        schedule: Schedule,
        tell: Tell,
        goes_on: Callable[[Evaluation], bool] = lambda quarter: True,
    ) -> Trained:
        self.restore(self._beginning)

        def count(step: int) -> None:
            tell(f"learning rate {schedule.learning_rate:g}, step {step} of {schedule.steps}")

        return finetune(self.model, self._windows, self._heldout, schedule, count, goes_on)

    def adapter(self) -> dict[str, Tensor]:
        """A copy of its weights, in the CPU's memory."""
        return {
            name: value.detach().to("cpu", copy=True)
            for name, value in self.model.named_parameters()
            if "lora_" in name
        }

    def restore(self, adapter: dict[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, value in adapter.items():
            parameters[name].data.copy_(value)


@dataclass(frozen=True)
class SeedRuns:
    """One start with one seed: what it makes of the held-out text untrained, and its fine-tunes."""

    seed: int
    before: Evaluation
    runs: dict[float, Trained]

    def told(self) -> list[schema.TrainingRun]:
        return [_told(rate, self.seed, run) for rate, run in self.runs.items()]


@dataclass(frozen=True)
class Contest:
    """All fine-tunes of a start; the search was with the first of the seeds."""

    search: Search
    seeds: list[SeedRuns]

    @property
    def rate(self) -> float | None:
        """The best learning rate; None where no run ended with a number."""
        return self.search.best_rate

    @property
    def finals(self) -> list[Trained]:
        """At the best rate, a run a seed; none where one of them has no number to show."""
        found = [] if self.rate is None else [each.runs[self.rate] for each in self.seeds]
        return found if all(map(ended, found)) else []

    @property
    def complaint(self) -> str | None:
        """Why no loss stands for the start, where none does."""
        if self.rate is None:
            lowest = self.search.rates[min(self.search.tried)]
            return (
                "training diverged at every learning rate that was tried "
                f"(--learning-rate {lowest / 4:g})"
            )
        if not self.finals:
            return (
                f"training diverged at learning rate {self.rate:g} with another seed than the "
                f"first (--learning-rate {self.rate / 2:g})"
            )
        return None

    @property
    def window_losses(self) -> list[float] | None:
        """The mean loss over the seeds after training, of every held-out window."""
        each = [run.after.window_losses for run in self.finals if run.after is not None]
        return [statistics.fmean(window) for window in zip(*each, strict=True)] or None

    def fields(self) -> dict[str, Any]:
        """Those of `schema.ComparedMethod` that are about training."""
        finals = self.finals
        losses = [run.after.loss for run in finals if run.after is not None]
        return {
            "learning_rate": self.rate,
            "rate_at_end": self.search.at_end,
            "heldout_loss_before": finite(
                statistics.fmean(each.before.loss for each in self.seeds)
            ),
            "heldout_loss_quarter": (
                finite(statistics.fmean(run.quarter.loss for run in finals)) if finals else None
            ),
            "heldout_loss_after": statistics.fmean(losses) if losses else None,
            "heldout_loss_spread": statistics.stdev(losses) if len(losses) > 1 else None,
            "train_seconds": sum(run.seconds for each in self.seeds for run in each.runs.values()),
            "loss_curve": finals[0].curve if finals else [],
            "runs": [
                _told(rate, fork.seed, run)
                for fork in self.seeds
                for rate, run in fork.runs.items()
            ],
        }


class Trials:
    """Trains one start after the other."""

    def __init__(self, plan: TrainingPlan) -> None:
        self.plan = plan
        # Where the next search begins: at the best of the last one, first in the middle.
        self._begin = len(plan.rates) // 2

    def search(self, trainee: Trainee, before: Evaluation, tell: Tell) -> Contest:
        """The best learning rate, with the first seed. The adapter stays as that rate left it."""
        plan = self.plan
        seed = plan.seeds[0]
        search = Search(plan.rates)
        ends: dict[float, dict[str, Tensor]] = {}

        def train(rate: float, goes_on: GoesOn) -> Trained:
            run = trainee.train(Schedule(plan.steps, rate, seed), tell, goes_on)
            for other in ends.keys() - {search.best_rate}:
                del ends[other]
            ends[rate] = trainee.adapter()
            return run

        search.walk(self._begin, train)
        if search.best is not None:
            self._begin = search.best
            trainee.restore(ends[plan.rates[search.best]])
        runs = {plan.rates[index]: run for index, run in search.tried.items()}
        return Contest(search, [SeedRuns(seed, before, runs)])

    def repeat(
        self, contest: Contest, seed: int, trainee: Trainee, before: Evaluation, tell: Tell
    ) -> None:
        """The same at its best rate with another seed."""
        assert contest.rate is not None
        run = trainee.train(Schedule(self.plan.steps, contest.rate, seed), tell)
        contest.seeds.append(SeedRuns(seed, before, {contest.rate: run}))


def _told(rate: float, seed: int, run: Trained) -> schema.TrainingRun:
    lost = finite(run.quarter.loss) is None or (run.after is not None and not ended(run))
    return schema.TrainingRun(
        learning_rate=rate,
        seed=seed,
        ended="diverged" if lost else "finished" if ended(run) else "stopped",
        heldout_loss_quarter=finite(run.quarter.loss),
        heldout_loss_after=None if run.after is None else finite(run.after.loss),
        seconds=run.seconds,
        loss_curve=run.curve,
    )


def described(plan: TrainingPlan, on_cpu: bool) -> dict[str, Any]:
    """How it is trained, as the Trainer has it: fields of `schema.CompareSettings`."""
    schedule = Schedule(plan.steps, plan.rates[0], plan.seeds[0])
    arguments = training_arguments(schedule, "unused", on_cpu=on_cpu)
    return {
        "learning_rate": plan.rates[0] if len(plan.rates) == 1 else None,
        "batch_windows": BATCH,
        "warmup_steps": int(arguments.warmup_steps),
        "training": {
            "learning_rates": list(plan.rates),
            "seeds": list(plan.seeds),
            "optimizer": arguments.optim.value,
            "lr_scheduler": arguments.lr_scheduler_type.value,
            "weight_decay": arguments.weight_decay,
            "max_grad_norm": arguments.max_grad_norm,
        },
    }


def forecast(plan: TrainingPlan, methods: int, windows: int, forward: float) -> str:
    """What is going to be trained, and how long that may take.

    ``forward`` are the seconds of the original's pass over the ``windows`` held-out windows.
    """
    run = forward * (_PASSES * plan.steps * BATCH / windows + 2)
    count, more = len(plan.rates), len(plan.seeds) - 1
    full = min(count, _USUAL_WALK) + more
    rates = f"learning rate {plan.rates[0]:g}"
    if count > 1:
        rates = f"the best it finds of {count} learning rates from {plan.rates[0]:g} to "
        rates += f"{plan.rates[-1]:g}"
    seeds = f" and there with {units.plural(more, 'more seed')}" if more else ""
    return (
        f"{units.plural(methods, 'start')} to fine-tune for {units.plural(plan.steps, 'step')}, "
        f"each at {rates}{seeds}: about {units.seconds(run)} a run, {full:g} of them a start, "
        f"{units.seconds(full * methods * run)} in all"
    )
