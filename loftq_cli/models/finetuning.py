"""A short fine-tune of an adapter with transformers' Trainer, the same for every start.

Batch, optimizer and schedule are the Trainer's own: eight windows a step, AdamW, a learning rate
that falls in a straight line to zero. Same seed, same windows in the same order, no dropout: what
differs between two runs is where they began and the learning rate.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_cli.models.evaluation import Evaluation, evaluate, finite
from loftq_cli.schema import LossPoint

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainingArguments

# Windows in a step: `per_device_train_batch_size` of TrainingArguments.
BATCH = 8
# Points of the loss curve.
_POINTS = 20


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and in which order is trained."""

    steps: int
    learning_rate: float
    seed: int

    @property
    def quarter(self) -> int:
        """The step after which held-out text is looked at before the end."""
        return math.ceil(self.steps / 4)


@dataclass(frozen=True)
class Trained:
    """The loss along the way, at a quarter of the steps and after the last one.

    ``after`` is None where the run was stopped at the quarter. Losses that are no number any more
    are kept as they are. The time is that of the steps and of the evaluations between them: what
    happens once in a process would fall on the first of several models.
    """

    curve: list[LossPoint]
    quarter: Evaluation
    after: Evaluation | None
    seconds: float


def finetune(
    model: Any,
    windows: Tensor,
    heldout: Tensor,
    schedule: Schedule,
    tell: Callable[[int], None] = lambda step: None,
    goes_on: Callable[[Evaluation], bool] = lambda quarter: True,
) -> Trained:
    """Trains the adapter of a PEFT model, which stays as the training left it.

    Args:
        windows: token ids to train on (n × length); they start again when all have been seen.
        heldout: token ids to evaluate on.
        tell: given the number of steps that are done.
        goes_on: given what the model makes of ``heldout`` at a quarter of the steps.
    """
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    _make_trainable(model)
    losses: dict[int, float] = {}
    evaluated: dict[int, Evaluation] = {}

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                losses[state.global_step] = float(logs["loss"])

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step
            tell(step)
            if step in (schedule.quarter, schedule.steps):
                evaluated[step] = evaluate(model, heldout)
            if step == schedule.quarter < schedule.steps and not goes_on(evaluated[step]):
                control.should_training_stop = True

    with tempfile.TemporaryDirectory(prefix="loftq-training-") as output:
        trainer = Trainer(
            model=model,
            args=training_arguments(schedule, output, on_cpu=model.device.type == "cpu"),
            train_dataset=[_example(each) for each in windows],
            callbacks=[Watch()],
        )
        for printing in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printing)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    curve = [
        LossPoint(
            step=step,
            train_loss=finite(losses.get(step)),
            heldout_loss=finite(evaluated[step].loss if step in evaluated else None),
        )
        for step in sorted({*losses, *evaluated})
    ]
    return Trained(curve, evaluated[schedule.quarter], evaluated.get(schedule.steps), seconds)


def training_arguments(schedule: Schedule, output: str, *, on_cpu: bool) -> TrainingArguments:
    """What the Trainer is told; whatever is not here is as it is for everybody."""
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=output,
        max_steps=schedule.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=schedule.learning_rate,
        seed=schedule.seed,
        data_seed=schedule.seed,
        logging_steps=max(1, schedule.steps // _POINTS),
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=on_cpu,
    )
    # As the Trainer itself does for a model with a place of its own: on several GPUs it would
    # give 16-bit models larger batches than 4-bit ones, which it does not spread.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _example(window: Tensor) -> dict[str, Tensor]:
    """Nothing predicts the first token, and the Trainer would count it in its mean."""
    labels = window.clone()
    labels[0] = -100
    return {"input_ids": window, "labels": labels}


def _make_trainable(model: Any) -> None:
    """The adapter's weights and nothing else; and no dropout, in training as in evaluation."""
    import torch

    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
