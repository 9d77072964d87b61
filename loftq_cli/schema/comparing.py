"""Results of `compare`: starts side by side, each held against the original model."""

from __future__ import annotations

from typing import Literal

from loftq_cli.formats import DEFAULT_CONTAINER
from loftq_cli.schema.envelope import Model


class Training(Model):
    """How every start was trained, beside its steps and batch, in terms of `TrainingArguments`.

    `learning_rates` are those to choose from: each start was led from one to the next until its
    best lay between two that are no better.
    """

    learning_rates: list[float]
    seeds: list[int]
    optimizer: str
    lr_scheduler: str
    weight_decay: float
    max_grad_norm: float


class DownstreamTask(Model):
    """A task of lm-eval, or a group that has scores of its own. `shots` are the examples that come
    before each of its `questions`, null where the tasks of a group differ.
    """

    name: str
    version: str
    shots: int | None
    questions: int


class CompareSettings(Model):
    """What all methods share. Texts are paths, or "built-in"; training is null without it.

    Of `containers` and `block_sizes` those that were asked for, the first of them `container` and
    `block_size`; which of them a method has is said there.

    `learning_rate` is that of all methods, and null where each has its own.
    """

    text: str
    calibration_text: str | None = None
    train_text: str | None = None
    predicted_tokens: int  # that KL and perplexity are means over
    window_tokens: int
    quant_type: str
    block_size: int
    double_quant: bool
    container: str = DEFAULT_CONTAINER
    containers: list[str] = [DEFAULT_CONTAINER]
    block_sizes: list[int] = []
    experts: list[str] | None = None
    iterations: str
    lora_alpha: float | None  # null: the rank
    rslora: bool
    target_modules: list[str]
    seed: int
    train_steps: int | None = None
    batch_windows: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None
    training: Training | None = None
    tasks: list[DownstreamTask] = []


class LossPoint(Model):
    """`train_loss` is the mean since the point before; null where only the other was measured."""

    step: int
    train_loss: float | None = None
    heldout_loss: float | None = None


class TrainingRun(Model):
    """One fine-tune. Losses are null where they are no number, or the run did not get so far.

    "stopped" is a run that was given up at a quarter of its steps, since it was far behind one at
    another learning rate; "diverged" one whose loss is no number any more.
    """

    learning_rate: float
    seed: int
    ended: Literal["finished", "stopped", "diverged"]
    heldout_loss_quarter: float | None
    heldout_loss_after: float | None
    seconds: float
    loss_curve: list[LossPoint]


class TaskScore(Model):
    """What lm-eval makes of one task, by one metric of it and the filter that answers go through.

    `standard_error` is lm-eval's, over questions; null where it has none for such a metric. `value`
    is null where it is no number.
    """

    task: str
    metric: str
    filter: str | None
    value: float | None
    standard_error: float | None
    higher_is_better: bool | None


class ComparedMethod(Model):
    """One start: "original" is the model itself, and "lora" its 16-bit weights with an adapter.

    `bits` is what a weight's code can say, `stored_bits` what it takes in the files, scales
    included (of "original" the mean of all its tensors). `grid` is what weights are rounded to,
    `nf4` or `int2`, in `container` and blocks of `block_size` (-1: a whole row); null for 16 bits.
    `experts` is what was asked for of experts, `quantize` or `keep`.
    What is relative to QLoRA is so on the same grid and at the same rank, and null where there is
    none: `error_removed` is the share of QLoRA's weight error that is gone, `kl_gain` is QLoRA's KL
    divergence over this one. `seconds` are those of making the files. KL, perplexity and losses are
    in nats a token of held-out text, and null where they are no finite number; losses also where
    there was no training, or it diverged.

    `learning_rate` is the best of those that were tried with the first seed, and `rate_at_end` says
    that it lies at an end of them, where a better one may lie beyond. Losses before, at a quarter
    of the steps and after are means over the seeds at that rate, and `heldout_loss_spread` is the
    standard deviation of the last. `train_seconds` are those of all `runs`, and `loss_curve` is
    that of the first seed at the best rate. `scores` are those of the start as it is,
    `trained_scores` those after that same fine-tune.
    """

    init: str
    bits: int
    stored_bits: float
    grid: str | None = None
    container: str | None = None
    block_size: int | None = None
    experts: str | None = None
    rank: int | None
    weight_error_relative: float | None
    error_removed: float | None = None
    kl_divergence: float | None
    kl_gain: float | None = None
    perplexity: float | None
    backbone_bytes: int
    adapter_bytes: int
    trainable_parameters: int
    seconds: float
    learning_rate: float | None = None
    rate_at_end: Literal["lowest", "highest"] | None = None
    heldout_loss_before: float | None = None
    heldout_loss_quarter: float | None = None
    heldout_loss_after: float | None = None
    heldout_loss_spread: float | None = None
    train_seconds: float | None = None
    loss_curve: list[LossPoint] = []
    runs: list[TrainingRun] = []
    scores: list[TaskScore] = []
    trained_scores: list[TaskScore] = []


class BitsVerdict(Model):
    """On this grid: the start nearest to the original by KL, and what it gains.

    `gain` is false where the best is within 2 % of QLoRA. `trained_*` compare held-out losses after
    training, each start at its own learning rate: `trained_init` ends lowest, `trained_margin` is
    how much lower than QLoRA, `trained_margin_error` the standard error of that over windows and
    seeds (null with one of each), and `trained_gain` whether it is more than twice the error.
    `trained_ties` are the starts whose difference to the lowest is not.
    """

    bits: int
    container: str = DEFAULT_CONTAINER
    block_size: int | None = None
    experts: str | None = None
    init: str
    rank: int
    gain: bool
    kl_gain: float | None
    kl_gain_over_plain_loftq: float | None = None
    trained_init: str | None = None
    trained_rank: int | None = None
    trained_learning_rate: float | None = None
    trained_margin: float | None = None
    trained_margin_error: float | None = None
    trained_gain: bool | None = None
    trained_ties: list[str] = []
    sentence: str


class GridVerdict(Model):
    """What a grid comes to with the best start of each kind, of all ranks: KL against bytes.

    `least` says that no grid of as many bytes or fewer has a lower KL.
    """

    grid: str
    container: str
    block_size: int | None = None
    experts: str | None = None
    stored_bits: float
    backbone_bytes: int
    data_free_init: str | None = None
    data_free_kl: float | None = None
    calibrated_init: str | None = None
    calibrated_kl: float | None = None
    least: bool


class TaskVerdict(Model):
    """The best start of a grid in a task, by the task's first metric, as it is or after training.

    `margin` is how much better it is than QLoRA at the same rank, `margin_error` the standard error
    of that if the two had been asked different questions: they are asked the same, so that it is
    rather less, and `gain` is whether the margin is more than twice as large; both are null where
    lm-eval has no standard error for the metric.
    """

    task: str
    metric: str
    filter: str | None
    trained: bool
    bits: int
    container: str
    block_size: int | None
    init: str
    rank: int
    value: float
    margin: float | None
    margin_error: float | None
    gain: bool | None
    sentence: str


class CompareVerdict(Model):
    """`sentence` says it all, `bits` has its parts; `grids` is there for files of several sizes,
    `tasks` where there were some."""

    sentence: str
    bits: list[BitsVerdict]
    grids: list[GridVerdict] = []
    tasks: list[TaskVerdict] = []


class CompareResults(Model):
    architecture: str
    base_parameters: int
    settings: CompareSettings
    methods: list[ComparedMethod]
    verdict: CompareVerdict
