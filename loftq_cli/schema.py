"""The result document: one versioned JSON object per run, the same envelope for every command.

Field names are stable and carry their unit. A minor version only adds keys, and readers ignore
keys they do not know; a major version may change meaning, and readers refuse it. NaN and infinity
are not JSON and not results: they are refused on the way in and on the way out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loftq_cli.errors import LoftqError

SCHEMA_VERSION = "1.0"

Scalar: TypeAlias = str | int | float | bool | None


class _Model(BaseModel):
    # `protected_namespaces` would claim every field that starts with "model".
    model_config = ConfigDict(
        allow_inf_nan=False, extra="ignore", frozen=True, protected_namespaces=()
    )


# --- the envelope -------------------------------------------------------------------------------


class Tool(_Model):
    name: str
    version: str


class ModelIdentity(_Model):
    """Which weights: `id` as the user would type it, `revision` the resolved commit if any."""

    id: str
    revision: str | None = None
    source: Literal["demo", "directory", "hub", "known"]


class Resolved(_Model):
    """What an `auto` became, and why."""

    value: Scalar
    reason: str


class Accelerator(_Model):
    name: str
    memory_bytes: int


class Environment(_Model):
    python: str
    platform: str
    machine: str
    cpu_count: int
    memory_bytes: int | None
    packages: dict[str, str]
    # Empty also where torch was never imported: a torch-free command does not look.
    accelerators: list[Accelerator] = []


Results = TypeVar("Results", bound=BaseModel)


class Document(_Model, Generic[Results]):
    # `schema` itself is taken: BaseModel has a method of that name.
    schema_name: str = Field(alias="schema")
    schema_version: str = SCHEMA_VERSION
    tool: Tool
    argv: list[str]
    model: ModelIdentity | None = None
    resolved: dict[str, Resolved] = {}
    environment: Environment
    results: Results
    warnings: list[str] = []
    timings_seconds: dict[str, float] = {}

    @property
    def command(self) -> str:
        return self.schema_name.removeprefix("loftq/")


# --- quantize -----------------------------------------------------------------------------------


class QuantizeSettings(_Model):
    bits: int
    quant_type: str
    block_size: int | None
    double_quant: bool
    rank: int
    lora_alpha: float
    rslora: bool = False
    iterations: int
    init: str = "loftq"
    target_modules: list[str] | str
    seed: int


class AdaptedLayer(_Model):
    """One layer that has a 4-bit weight and an adapter. What is measured is null in a dry run."""

    name: str
    shape: tuple[int, int]
    bits: int
    rank: int
    weight_error_relative: float | None = None
    quantized_only_error_relative: float | None = None
    iterations: int
    best_iteration: int | None = None
    error_curve: list[float] = []
    seconds: float | None = None
    bytes: int
    share_of_bytes: float


class PlainLayer(_Model):
    """One layer that is quantized and gets no adapter."""

    name: str
    shape: tuple[int, int]
    bits: int
    reason: str
    quantized_only_error_relative: float | None = None
    bytes: int
    share_of_bytes: float


class UntouchedTensor(_Model):
    """One tensor that is written exactly as it was."""

    name: str
    shape: list[int]
    reason: str
    bytes: int
    share_of_bytes: float


class SourceFile(_Model):
    """A weight file that was read, told apart from others by its size and its header."""

    name: str
    bytes: int
    header_sha256: str


class WrittenFile(_Model):
    name: str
    bytes: int
    sha256: str | None = None


class QuantizeTotals(_Model):
    """In a dry run the errors are null and the bytes and memory are estimates.

    `output_bytes` is the backbone alone, as `input_bytes` is; the adapter comes on top.
    """

    weight_error_relative: float | None = None
    quantized_only_error_relative: float | None = None
    input_bytes: int
    output_bytes: int
    adapter_bytes: int
    peak_memory_bytes: int | None
    parameters: int
    trainable_parameters: int
    seconds: float | None = None


class QuantizeResults(_Model):
    output: str  # empty in a dry run that names no directory
    dry_run: bool = False
    architecture: str
    task_type: str | None = None  # PEFT's name for what the model does; null where it has none
    # The last names of layers that the source stores as (in, out), as GPT-2 does.
    conv1d: list[str] = []
    fingerprint: str | None = None  # of source and settings: two runs with the same are one
    settings: QuantizeSettings
    layers: list[AdaptedLayer]
    without_adapter: list[PlainLayer] = []
    untouched: list[UntouchedTensor] = []
    files: list[WrittenFile] = []
    source_files: list[SourceFile] = []
    totals: QuantizeTotals


# --- load ---------------------------------------------------------------------------------------


class LoadResults(_Model):
    architecture: str
    parameters: int
    parameter_bytes: int
    bytes_by_dtype: dict[str, int]
    load_seconds: float
    peak_memory_bytes: int
    device: str
    dtype: str
    quantization: str | None = None
    quantized_layers: int = 0
    adapter: str | None = None
    adapter_parameters: int = 0
    tokenizer: str | None = None
    vocabulary_size: int | None = None
    peak_device_memory_bytes: int | None = None  # on the accelerator; null on a CPU
    random_weights: bool = False


# --- sweep-ranks --------------------------------------------------------------------------------


class SweepSettings(_Model):
    target_modules: list[str]
    bits: int
    quant_type: str | None  # null at 8 and 16 bits, as the next
    block_size: int | None
    batch_size: int
    sequence_length: int
    vram_bytes: int | None = None


class MemoryEstimate(_Model):
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


class RankCost(_Model):
    """`trainable_percent` is of base + adapter; `reduction_factor` is base / trainable.

    `fits` is null without --vram, the error without --error.
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


class Verdict(_Model):
    """`sentence` says it all; `recommended_rank` is null where nothing fits."""

    recommended_rank: int | None
    reason: Literal["error", "memory", "cost"]
    sentence: str


class SweepRanksResults(_Model):
    architecture: str
    base_parameters: int
    quantized_parameters: int
    modules: int  # that get an adapter
    settings: SweepSettings
    quantized_only_error_relative: float | None = None
    ranks: list[RankCost]
    verdict: Verdict


# --- targets ------------------------------------------------------------------------------------


class LayerKind(_Model):
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


class TargetPreset(_Model):
    name: str
    target_modules: list[str]
    modules: int
    parameters: int
    trainable_parameters: int
    trainable_percent: float
    adapter_bytes: int


class SkippedModule(_Model):
    """What gets no adapter and stays as it is. `shape` is null where it is not one for all."""

    name: str
    reason: str
    count: int
    shape: list[int] | None
    parameters: int
    share_of_parameters: float


class TargetsResults(_Model):
    """`guessed` and `without_role` are names that no preset knows: see `loftq_cli.models.presets`.

    The first are in presets by the place they stand in, the second only in all-linear.
    """

    architecture: str
    base_parameters: int
    rank: int
    layers: list[LayerKind]
    presets: list[TargetPreset]
    skipped: list[SkippedModule]
    guessed: list[str] = []
    without_role: list[str] = []


# --- generate -----------------------------------------------------------------------------------


class Generation(_Model):
    prompt: str
    generated_text: str
    new_tokens: int
    seconds: float
    tokens_per_second: float
    prompt_tokens: int | None = None


class GenerateResults(_Model):
    generations: list[Generation]
    average_seconds: float
    average_tokens_per_second: float
    max_new_tokens: int
    device: str
    dtype: str
    adapter: str | None = None
    # Null where each token was the likeliest one.
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


# --- check --------------------------------------------------------------------------------------


class CheckTest(_Model):
    """One check: what it set out to verify, and what it found or why it failed."""

    name: str
    group: str
    status: Literal["passed", "failed", "skipped"]
    seconds: float
    verified: str
    detail: str
    figures: dict[str, Scalar] = {}
    rows: list[dict[str, Scalar]] = []  # where the finding is a table
    cause: str | None = None
    hint: str | None = None


class CheckSummary(_Model):
    """`skipped` are checks that this model or an earlier failure left nothing to do for."""

    total: int
    passed: int
    failed: int
    skipped: int = 0
    seconds: float


class CheckResults(_Model):
    tests: list[CheckTest]
    summary: CheckSummary


# --- verify -------------------------------------------------------------------------------------


class VerifiedLayer(_Model):
    """‖W − Q − s·B·A‖ / ‖W‖ by the files and by the report; null where it is no number."""

    name: str
    shape: tuple[int, int]
    weight_error_relative: float | None
    reported_weight_error_relative: float | None
    agrees: bool


class VerifyResults(_Model):
    """A certificate. `layers` are those whose residual was measured, `measured_layers` of them."""

    directory: str
    source: str | None  # what they were measured against; null where it was not at hand
    quantized_layers: int
    measured_layers: int
    tests: list[CheckTest]
    layers: list[VerifiedLayer] = []
    summary: CheckSummary


# --- report -------------------------------------------------------------------------------------


class ReportedDocument(_Model):
    """One document that was read, whole; `file` is `-` for stdin."""

    file: str
    document: dict[str, Any]


class Remark(_Model):
    """One sentence that the numbers of a document, or of several, led to."""

    command: str
    model: str | None
    text: str


class SkippedFile(_Model):
    file: str
    reason: str


class ReportResults(_Model):
    systems: list[Environment]  # each once
    documents: list[ReportedDocument]
    findings: list[Remark]
    recommendations: list[Remark]
    skipped: list[SkippedFile] = []


# --- reading and writing ------------------------------------------------------------------------

RESULTS: Mapping[str, type[BaseModel]] = {
    "quantize": QuantizeResults,
    "load": LoadResults,
    "sweep-ranks": SweepRanksResults,
    "targets": TargetsResults,
    "generate": GenerateResults,
    "check": CheckResults,
    "verify": VerifyResults,
    "report": ReportResults,
}


class NotAResultDocument(LoftqError):
    """The text is no result document that this version can read."""


def dump_json(document: Document[Any]) -> str:
    """The document as text: keys in declared order, two spaces, a newline at the end."""
    data = document.model_dump(mode="json", by_alias=True)
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    # Readable in any script, and yet harmless to a terminal: only what does not print is escaped.
    lines = (line if line.isprintable() else _escaped(line) for line in text.split("\n"))
    return "\n".join(lines) + "\n"


def _escaped(line: str) -> str:
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def load_document(text: str) -> Document[Any]:
    """Reads what `dump_json` wrote, in this or an earlier minor version, or a later one."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        cause = "it is nested too deeply" if deep else str(error)
        raise NotAResultDocument("this is not JSON", cause=cause) from None
    return document_of(data)


def document_of(data: Any) -> Document[Any]:
    """The same from JSON that has been parsed."""
    name = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(name, str) or not name.startswith("loftq/"):
        raise NotAResultDocument(
            "this is not a loftq result document",
            cause='its "schema" is not "loftq/<command>"',
        )
    version = data.get("schema_version")
    if str(version).partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
        raise NotAResultDocument(
            f"cannot read version {version} of {name}",
            cause=f"this loftq reads version {SCHEMA_VERSION.partition('.')[0]}.x",
            hint="read it with the loftq that wrote it, or run the command again",
        )
    results = RESULTS.get(name.removeprefix("loftq/"))
    if results is None:
        raise NotAResultDocument(
            f"cannot read {name}",
            cause="this loftq has no such command",
            hint="pip install --upgrade loftq",
        )
    try:
        return Document[results].model_validate(data)  # type: ignore[valid-type]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise NotAResultDocument(
            f"this {name} document is damaged", cause=f"{place}: {first['msg']}"
        ) from None
