"""Results of `quantize` and `verify`, and of `export`, `merge` and `push`, which use its output."""

from __future__ import annotations

from typing import Literal

from loftq_cli.schema.envelope import Model
from loftq_cli.schema.running import CheckSummary, CheckTest


class CalibratedOn(Model):
    """The text that the layers' inputs were seen on; counts are null in a dry run."""

    sha256: str
    windows: int | None = None
    tokens: int | None = None


class ExpertShape(Model):
    """So many matrices of experts have this shape."""

    out_features: int
    in_features: int
    count: int


class Experts(Model):
    """The matrices of a model's experts, one of each expert counted as one however files hold them.

    Bytes are those of their tensors before and after; `reason` is why those that are not
    `quantized` stay as they are, null where there are none. `loader` is who loads quantized ones
    that files had as stacks: transformers as layers of their own, or none but loftq (and servers
    that read such); null where they had none, or where transformers stacks them again.
    """

    matrices: int
    quantized: int
    shapes: list[ExpertShape]
    parameters: int
    share_of_parameters: float
    input_bytes: int
    output_bytes: int
    reason: str | None = None
    loader: Literal["transformers", "loftq"] | None = None


class ExpertAdapters(Model):
    """Adapters on the parameters that a model holds its experts as, by PEFT's `target_parameters`.

    `experts` counts each of a parameter's, `parameters` what is trained. Errors are those of all of
    them, without and with the adapters: null in a dry run, and where nothing is corrected. Layers
    and totals have those of experts without.
    """

    target_parameters: list[str]
    experts: int
    rank: int
    parameters: int
    backbone_error_relative: float | None = None
    weight_error_relative: float | None = None


class QuantizeSettings(Model):
    """`leading` is (blocks, bits) of the first blocks; `iterations` null: until it hardly pays."""

    bits: int
    leading: tuple[int, int] | None = None
    target_bits: float | None = None
    container: str = "bitsandbytes"
    quant_type: str
    block_size: int | None
    double_quant: bool
    # Of the tensors of packed 4-bit codes; null where none is to be chosen, and in older reports,
    # where it is uint8.
    quant_storage: str | None = None
    rank: int
    rank_budget: bool = False
    uniform_rank: bool = False
    lora_alpha: float
    rslora: bool = False
    iterations: int | None
    init: str = "loftq"
    calibration: CalibratedOn | None = None
    # Whose activations it saw: null without a calibration, and in older reports, where it is
    # parallel.
    calibration_order: Literal["sequential", "parallel"] | None = None
    distill_steps: int | None = None
    svd: str = "auto"
    target_modules: list[str] | str
    seed: int
    dtype: str | None = None  # of all that is not quantized, where it is not the source's
    adapter_dtype: str = "float32"
    experts: Literal["quantize", "keep"] | None = None  # null: as the container has it


class AdaptedLayer(Model):
    """One layer that has an adapter. What is measured is null in a dry run, and so is what follows
    from that: `bits` with --target-bits, `rank` with --rank-budget.

    `bits` is what a code tells, whatever it takes in the file; the errors of outputs are of the
    calibration's inputs and null without one. `backbone_error_relative` is what the stored weight
    leaves without the adapter that it was chosen for. `stored_rank` counts the padding of
    --uniform-rank.
    """

    name: str
    shape: tuple[int, int]
    bits: int | None
    rank: int | None
    stored_rank: int | None = None
    weight_error_relative: float | None = None
    quantized_only_error_relative: float | None = None
    output_error_relative: float | None = None
    quantized_only_output_error_relative: float | None = None
    backbone_error_relative: float | None = None
    iterations: int
    best_iteration: int | None = None
    error_curve: list[float] = []
    seconds: float | None = None
    bytes: int
    share_of_bytes: float


class PlainLayer(Model):
    """One layer that is quantized and gets no adapter; what is null in a dry run is so here too."""

    name: str
    shape: tuple[int, int]
    bits: int | None
    reason: str
    weight_error_relative: float | None = None  # of its codes as they are stored
    quantized_only_error_relative: float | None = None
    output_error_relative: float | None = None
    quantized_only_output_error_relative: float | None = None
    bytes: int
    share_of_bytes: float


class UntouchedTensor(Model):
    """One tensor that is not quantized: written exactly as it was, unless in another dtype."""

    name: str
    shape: list[int]
    reason: str
    bytes: int
    share_of_bytes: float


class SourceFile(Model):
    """A weight file that was read, told apart from others by its size and its header."""

    name: str
    bytes: int
    header_sha256: str
    etag: str | None = None  # what the hub that it was read from knows its content by


class WrittenFile(Model):
    name: str
    bytes: int
    sha256: str | None = None


class NotCopied(Model):
    """A file or folder of the source that is not in the output, though it is no weight of it."""

    name: str
    reason: str


class QuantizeTotals(Model):
    """In a dry run the errors are null and the bytes and memory are estimates.

    `output_bytes` is the backbone alone, as `input_bytes` is; the adapter comes on top.
    `stored_bits` is what a weight of the quantized layers takes in the file, scales included;
    `information_bits` what its code and scale tell, which is less at 2 and 3 bits.
    """

    weight_error_relative: float | None = None
    quantized_only_error_relative: float | None = None
    output_error_relative: float | None = None
    quantized_only_output_error_relative: float | None = None
    backbone_error_relative: float | None = None
    stored_bits: float | None = None
    information_bits: float | None = None
    input_bytes: int
    output_bytes: int
    adapter_bytes: int
    peak_memory_bytes: int | None
    parameters: int
    trainable_parameters: int
    seconds: float | None = None


class Distillation(Model):
    """A training of the adapters on the calibration text, at the end; codes stay as they are.

    In a step are `batch` windows of `window_length` tokens, of the `tokens` that were taken of the
    text. KL divergences from the original are of some of these windows, in nats a token, with the
    adapters as they were written before and after; where the two are the same, nothing was gained,
    and the adapters are those before. The model computed in `dtype`. The errors of weights are of
    after it; those of outputs, which are of the start before it, are null, and there are no curves.
    """

    steps: int
    learning_rate: float
    batch: int
    window_length: int
    tokens: int
    kl_before: float
    kl_after: float
    dtype: str
    seconds: float


class MergedFrom(Model):
    """What `merge --requantize` quantized: the weights of `source` with `adapter` in them."""

    source: str
    adapter: str


class QuantizeResults(Model):
    output: str  # empty in a dry run that names no directory
    # The hub's name for it, in the report of a directory that was pushed there.
    repository: str | None = None
    dry_run: bool = False
    architecture: str
    # The class of transformers whose `from_pretrained` opens the output; null in a dry run, and in
    # reports of before it was recorded. With `own_code` that needs `trust_remote_code=True`.
    auto_class: str | None = None
    own_code: bool = False
    # What said which tensors are layers: the model class and the libraries that load it, or names
    # and shapes alone, as in a dry run.
    counted_by: Literal["class", "names"] = "class"
    task_type: str | None = None  # PEFT's name for what the model does; null where it has none
    # The last names of layers that the source stores as (in, out), as GPT-2 does.
    conv1d: list[str] = []
    # Of what was quantized, where that is no model on a disk. No layer has an adapter then.
    merged: MergedFrom | None = None
    fingerprint: str | None = None  # of source and settings: two runs with the same are one
    settings: QuantizeSettings
    # With --target-bits: layers that have the same bits only because servers hold them as one.
    evened: list[list[str]] = []
    layers: list[AdaptedLayer]
    without_adapter: list[PlainLayer] = []
    untouched: list[UntouchedTensor] = []
    experts: Experts | None = None
    expert_adapters: ExpertAdapters | None = None
    distillation: Distillation | None = None
    files: list[WrittenFile] = []
    source_files: list[SourceFile] = []
    # The hub that the weights were read from by range requests; null where they were on a disk.
    streamed_from: str | None = None
    not_copied: list[NotCopied] = []
    totals: QuantizeTotals


class VerifiedLayer(Model):
    """‖W − Q − s·B·A‖ / ‖W‖ by the files and by the report; null where it is no number."""

    name: str
    shape: tuple[int, int]
    weight_error_relative: float | None
    reported_weight_error_relative: float | None
    agrees: bool


class VerifyResults(Model):
    """A certificate. `layers` are those whose residual was measured, `measured_layers` of them."""

    directory: str
    source: str | None  # what they were measured against; null where it was not at hand
    quantized_layers: int
    measured_layers: int
    tests: list[CheckTest]
    layers: list[VerifiedLayer] = []
    summary: CheckSummary


class ExportResults(Model):
    """The same codes in another container. Bytes are of the backbone's tensors, and stored bits
    what a weight of its quantized layers takes in the file, scales included."""

    source: str
    output: str
    source_container: str
    container: str
    quantized_layers: int
    files: list[WrittenFile]
    input_bytes: int
    output_bytes: int
    source_stored_bits: float
    stored_bits: float
    seconds: float


class RequantizedLayer(Model):
    """‖W − Q′‖ / ‖W‖ of a merged weight W and what its new codes dequantize to."""

    name: str
    shape: tuple[int, int]
    bits: int
    weight_error_relative: float


class Requantized(Model):
    """What merged weights were quantized to again, and what that costs; in total of all layers
    taken as one long vector. The result holds no adapter."""

    container: str
    quant_type: str
    block_size: int | None
    double_quant: bool
    stored_bits: float
    weight_error_relative: float
    layers: list[RequantizedLayer]


class MergeResults(Model):
    """A trained adapter in the dequantized weights. `dtype` is that of most of them; bytes are of
    the model's tensors.

    `output_deviation` is the largest ‖W·x − (Q·x + s·B·(A·x))‖ / ‖Q·x + s·B·(A·x)‖ of the layers
    that were read back, at one random x: the rounding to `dtype`, and to codes where the weights
    were `requantized`.
    """

    source: str
    adapter: str
    output: str
    source_container: str
    dtype: str
    quantized_layers: int
    merged_layers: int
    replaced: list[str] = []  # tensors of heads that were trained beside the adapter
    files: list[WrittenFile]
    input_bytes: int
    output_bytes: int
    checked_layers: int
    output_deviation: float
    requantized: Requantized | None = None
    seconds: float


class PushResults(Model):
    """What a hub's repository has of a directory now; `bytes` of all its `files` together.

    README, adapter config and report differ from those on the disk: they name the repository.
    """

    directory: str
    repository: str
    url: str
    private: bool
    commit: str
    files: list[WrittenFile]
    deleted: list[str] = []  # what was there of another output, with --force
    bytes: int
    seconds: float
