"""Results of `sweep-ranks` and `targets`: what is there, and what it would cost."""

from __future__ import annotations

from typing import Literal

from loftq_cli.formats import DEFAULT_CONTAINER
from loftq_cli.schema.envelope import Model
from loftq_cli.schema.quantizing import CalibratedOn, Experts


class SweepSettings(Model):
    """In bitsandbytes, `bits` of 2 and 3 are fewer codes of 4 bits: memory is as at 4."""

    target_modules: list[str]
    bits: int
    container: str = DEFAULT_CONTAINER
    packed: bool = True  # while fine-tuning; else the weights are dequantized before it
    quant_type: str | None  # null without blocks, as the next
    block_size: int | None
    batch_size: int
    sequence_length: int
    vram_bytes: int | None = None
    calibration: CalibratedOn | None = None


class MemoryEstimate(Model):
    """What fine-tuning holds at once; `loftq_cli.models.costs` has the formula of every term.

    `total_bytes` is with all activations, `total_with_checkpointing_bytes` with gradient
    checkpointing.
    """

    weights_bytes: int
    absmax_bytes: int
    unquantized_bytes: int
    adapter_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    activations_with_checkpointing_bytes: int
    logits_bytes: int
    workspace_bytes: int
    context_bytes: int
    total_bytes: int
    total_with_checkpointing_bytes: int


class RankCost(Model):
    """`trainable_percent` is of base + adapter; `reduction_factor` is base / trainable.

    `fits` is null without --vram, errors are without --error, those of outputs without
    --calibration-text. What is `removed` is the share of the error of plain quantization that
    backbone and adapter take away together, by the start that is best for weights or for outputs.
    """

    rank: int
    trainable_parameters: int
    total_parameters: int
    trainable_percent: float
    reduction_factor: float
    adapter_bytes: int
    memory: MemoryEstimate
    fits: bool | None = None
    fits_with_checkpointing: bool | None = None
    weight_error_relative: float | None = None
    weight_error_removed: float | None = None
    output_error_relative: float | None = None
    output_error_removed: float | None = None


class Verdict(Model):
    """`sentence` says it all; `recommended_rank` is null where nothing fits."""

    recommended_rank: int | None
    reason: Literal["error", "memory", "cost"]
    sentence: str


class SweepRanksResults(Model):
    """`counted_by` is what said which tensors are layers: names and shapes, or the model class."""

    architecture: str
    counted_by: Literal["class", "names"] = "names"
    base_parameters: int
    quantized_parameters: int
    modules: int  # that get an adapter
    experts: Experts | None = None
    settings: SweepSettings
    quantized_only_error_relative: float | None = None
    quantized_only_output_error_relative: float | None = None
    ranks: list[RankCost]
    verdict: Verdict


class LayerKind(Model):
    """Linear layers of one name and one shape; `name` goes into --target-modules as it stands."""

    name: str
    count: int
    in_features: int
    out_features: int
    parameters: int
    share_of_parameters: float
    trainable_parameters: int
    role: str | None = None
    also_selects: list[str] = []


class TargetPreset(Model):
    name: str
    target_modules: list[str]
    modules: int
    parameters: int
    trainable_parameters: int
    trainable_percent: float
    adapter_bytes: int


class SkippedModule(Model):
    """What gets no adapter and, but for experts, stays as it is.

    `shape` is null where it is not one for all.
    """

    name: str
    reason: str
    count: int
    shape: list[int] | None
    parameters: int
    share_of_parameters: float


class TargetsResults(Model):
    """`guessed` and `without_role` are names that no preset knows: see `loftq_cli.models.presets`.

    The first are in presets by the place they stand in, the second only in all-linear. `counted_by`
    is what said which tensors are layers: names and shapes, or the model class. `stored_bits` are
    those of a weight in the layers that `container` takes, scales included, at `bits` and with its
    default block size, and `quantized_bytes` all of them.
    """

    architecture: str
    counted_by: Literal["class", "names"] = "names"
    base_parameters: int
    rank: int
    container: str = DEFAULT_CONTAINER
    bits: int = 4
    stored_bits: float | None = None
    quantized_bytes: int | None = None
    layers: list[LayerKind]
    presets: list[TargetPreset]
    skipped: list[SkippedModule]
    experts: Experts | None = None
    guessed: list[str] = []
    without_role: list[str] = []
