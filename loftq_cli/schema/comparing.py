"""Results of `compare`: starts side by side, each held against the original model."""

from __future__ import annotations

from loftq_cli.schema.envelope import Model


class CompareSettings(Model):
    """What all methods share. Texts are paths, or "built-in"; training is null without it."""

    text: str
    calibration_text: str | None = None
    train_text: str | None = None
    predicted_tokens: int  # that KL and perplexity are means over
    window_tokens: int
    quant_type: str
    block_size: int
    double_quant: bool
    iterations: str
    lora_alpha: float | None  # null: the rank
    rslora: bool
    target_modules: list[str]
    seed: int
    train_steps: int | None = None
    batch_windows: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None


class LossPoint(Model):
    """`train_loss` is the mean since the point before; null where only the other was measured."""

    step: int
    train_loss: float | None = None
    heldout_loss: float | None = None


class ComparedMethod(Model):
    """One start: "original" is the model itself, and "lora" its 16-bit weights with an adapter.

    `bits` is what a weight's code can say, `stored_bits` what it takes in the files, scales
    included (of "original" the mean of all its tensors). What is relative to QLoRA is so at the
    same bits and rank, and null where there is none: `error_removed` is the share of QLoRA's weight
    error that is gone, `kl_gain` is QLoRA's KL divergence over this one. `seconds` are those of
    making the files. KL, perplexity and losses are in nats a token of held-out text, and null where
    they are no finite number; losses also where there was no training, or it diverged.
    """

    init: str
    bits: int
    stored_bits: float
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
    heldout_loss_before: float | None = None
    heldout_loss_after: float | None = None
    train_seconds: float | None = None
    loss_curve: list[LossPoint] = []


class BitsVerdict(Model):
    """At these bits: the start nearest to the original by KL, and what it gains.

    `gain` is false where the best is within 2 % of QLoRA. `trained_*` compare held-out losses after
    training, at one seed: `trained_margin` is how much lower than QLoRA's that of `trained_init`
    is, `trained_margin_error` its standard error over the windows of the text.
    """

    bits: int
    init: str
    rank: int
    gain: bool
    kl_gain: float | None
    kl_gain_over_plain_loftq: float | None = None
    trained_init: str | None = None
    trained_rank: int | None = None
    trained_margin: float | None = None
    trained_margin_error: float | None = None
    trained_gain: bool | None = None
    sentence: str


class CompareVerdict(Model):
    """`sentence` says it all, `bits` has its parts."""

    sentence: str
    bits: list[BitsVerdict]


class CompareResults(Model):
    architecture: str
    base_parameters: int
    settings: CompareSettings
    methods: list[ComparedMethod]
    verdict: CompareVerdict
