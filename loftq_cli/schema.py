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


# --- reading and writing ------------------------------------------------------------------------

RESULTS: Mapping[str, type[BaseModel]] = {
    "quantize": QuantizeResults,
    "load": LoadResults,
    "generate": GenerateResults,
    "check": CheckResults,
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
    except ValueError as error:
        raise NotAResultDocument("this is not JSON", cause=str(error)) from None
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
