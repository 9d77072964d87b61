"""The fine-tunes of a start: at several learning rates, then at the best with more seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_cli import schema
from loftq_cli.commands.compare_plan import TrainingPlan
from loftq_cli.commands.compare_rates import Search, ended
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
        self._model, self._windows, self._heldout = model, windows, heldout
        self._beginning = {
            name: value.detach().clone()
            for name, value in model.named_parameters()
            if "lora_" in name
        }

    def train(
        self,
        schedule: Schedule,
        tell: Tell,
        goes_on: Callable[[Evaluation], bool] = lambda quarter: True,
    ) -> Trained:
        parameters = dict(self._model.named_parameters())
        for name, value in self._beginning.items():
            parameters[name].data.copy_(value)

        def count(step: int) -> None:
            tell(f"learning rate {schedule.learning_rate:g}, step {step} of {schedule.steps}")

        return finetune(self._model, self._windows, self._heldout, schedule, count, goes_on)


@dataclass(frozen=True)
class Fork:
    """One start with one seed: what it makes of the held-out text untrained, and its fine-tunes."""

    seed: int
    before: Evaluation
    runs: dict[float, Trained]


@dataclass(frozen=True)
class Contest:
    """All fine-tunes of a start; the first fork is that of the search."""

    forks: list[Fork]
    search: Search

    @property
    def finals(self) -> list[Trained]:
        """At the best rate, a run a seed; none where one of them has no number to show."""
        rate = self.search.best_rate
        found = [] if rate is None else [fork.runs[rate] for fork in self.forks]
        return found if all(map(ended, found)) else []

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
            "learning_rate": self.search.best_rate,
            "rate_at_end": self.search.at_end,
            "heldout_loss_before": finite(statistics.fmean(f.before.loss for f in self.forks)),
            "heldout_loss_quarter": (
                finite(statistics.fmean(run.quarter.loss for run in finals)) if finals else None
            ),
            "heldout_loss_after": statistics.fmean(losses) if losses else None,
            "heldout_loss_spread": statistics.stdev(losses) if len(losses) > 1 else None,
            "train_seconds": sum(run.seconds for fork in self.forks for run in fork.runs.values()),
            "loss_curve": finals[0].curve if finals else [],
            "runs": [
                _told(rate, fork.seed, run)
                for fork in self.forks
                for rate, run in fork.runs.items()
            ],
        }


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
        f"each at {rates}{seeds}: about {units.seconds(run)} a run, {full:g} runs a start, "
        f"{units.seconds(full * methods * run)} in all"
    )
