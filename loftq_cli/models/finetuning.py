"""A short fine-tune of an adapter with transformers' Trainer, the same for every start.

Same seed, same windows in the same order, AdamW with a constant learning rate after a warmup, no
dropout: what differs between two runs is where they began.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import LoftqError
from loftq_cli.models.evaluation import Evaluation, evaluate, finite
from loftq_cli.schema import LossPoint

if TYPE_CHECKING:
    from torch import Tensor

# Windows in a step.
BATCH = 8
# Between QLoRA's 2e-4 for large models and the 1e-3 that suit small ones.
LEARNING_RATE = 4e-4
WARMUP_SHARE = 0.05
# Points of the loss curve, and how often held-out text is evaluated on the way.
_POINTS = 20
_EVALUATIONS = 2


class TrainingDiverged(LoftqError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Schedule:
    """How every start is trained."""

    steps: int
    learning_rate: float
    seed: int

    @property
    def warmup_steps(self) -> int:
        """Of the first of them the Trainer takes none: its rate is zero."""
        steps = int(WARMUP_SHARE * self.steps)
        return steps if steps > 1 else 0


@dataclass(frozen=True)
class Trained:
    """The loss before the first step, along the way, and after the last one.

    The time is that of the steps and of the evaluations between them: what happens
    once in a process would fall on the first of several models.
    """

    curve: list[LossPoint]
    before: Evaluation
    after: Evaluation
    seconds: float


def finetune(
    model: Any,
    windows: Tensor,
    heldout: Tensor,
    schedule: Schedule,
    tell: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Trains the adapter of a PEFT model, which stays as the training left it.

    Args:
        windows: token ids to train on (n × length); they start again when all have been seen.
        heldout: token ids to evaluate on.
        tell: given the number of steps that are done.

    Raises:
        TrainingDiverged: the loss is no number any more.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    _make_trainable(model)
    evaluate_at = {
        max(1, round(schedule.steps * each / _EVALUATIONS)) for each in range(1, _EVALUATIONS + 1)
    }
    every = max(1, schedule.steps // _POINTS)
    losses: dict[int, float] = {}
    evaluated: dict[int, Evaluation] = {}

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                losses[state.global_step] = float(logs["loss"])

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            tell(state.global_step)
            if state.global_step in evaluate_at:
                evaluated[state.global_step] = evaluate(model, heldout)

    before = evaluate(model, heldout)
    if not math.isfinite(before.loss):
        raise TrainingDiverged("there is nothing to train: what it predicts is no number already")
    with tempfile.TemporaryDirectory(prefix="loftq-training-") as output:
        arguments = TrainingArguments(
            output_dir=output,
            max_steps=schedule.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=schedule.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=schedule.warmup_steps,
            optim="adamw_torch",
            weight_decay=0.0,
            seed=schedule.seed,
            data_seed=schedule.seed,
            logging_steps=every,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=model.device.type == "cpu",
        )
        # As the Trainer itself does for a model with a place of its own: on several GPUs it would
        # give 16-bit models larger batches than 4-bit ones, which it does not spread.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = Trainer(
            model=model,
            args=arguments,
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
    after = evaluated[schedule.steps]
    if not math.isfinite(after.loss):
        raise TrainingDiverged(
            "training diverged: the loss is no number any more",
            cause=f"after {schedule.steps} steps at a learning rate of {schedule.learning_rate:g}",
            hint=f"--learning-rate {schedule.learning_rate / 4:g}",
        )
    return Trained(curve, before, after, seconds)


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
