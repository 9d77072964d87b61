"""Results of `load`, `generate` and `check`: what was tried on this box."""

from __future__ import annotations

from typing import Literal

from loftq_cli.schema.envelope import Model, Scalar


class LoadResults(Model):
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
    dequantized: bool = False  # their codes were, on loading: they are plain weights in memory
    adapter: str | None = None
    adapter_parameters: int = 0
    tokenizer: str | None = None
    vocabulary_size: int | None = None
    peak_device_memory_bytes: int | None = None  # on the accelerator; null on a CPU
    random_weights: bool = False


class Generation(Model):
    prompt: str
    generated_text: str
    new_tokens: int
    seconds: float
    tokens_per_second: float
    prompt_tokens: int | None = None


class GenerateResults(Model):
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


class CheckTest(Model):
    """One check: what it set out to verify, and what it found or why it failed."""

    name: str
    group: str
    status: Literal["passed", "failed", "skipped"]
    seconds: float
    verified: str
    detail: str
    figures: dict[str, Scalar] = {}
    rows: list[dict[str, Scalar]] = []  # where the finding is a table
    notes: list[str] = []  # what a check that passed did not look at
    cause: str | None = None
    hint: str | None = None


class CheckSummary(Model):
    """`skipped` are checks that this model or an earlier failure left nothing to do for."""

    total: int
    passed: int
    failed: int
    skipped: int = 0
    seconds: float


class CheckResults(Model):
    tests: list[CheckTest]
    summary: CheckSummary
