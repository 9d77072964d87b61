"""The options of every command, spelled once.

A command picks from these by annotation: ``def load(run: Run, model: Model = "demo", ...)``.
The type says how it is spelled, the command says its default.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from loftq_cli.errors import UsageError


def _complete_model(incomplete: str) -> Iterator[str]:
    """The built-in model, directories, and what the Hugging Face cache already holds."""
    yield "demo"
    base = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent)
    prefix = "./" if incomplete.startswith("./") and str(base) == "." else ""
    with suppress(OSError):
        yield from (f"{prefix}{each}/" for each in base.iterdir() if each.is_dir())
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    for each in cache.glob("models--*"):
        yield each.name.removeprefix("models--").replace("--", "/")


def _complete_device() -> list[str]:
    return ["auto", "cpu", "cuda", "cuda:0"]


def _complete_targets() -> list[tuple[str, str]]:
    return [("all-linear", "every linear layer but the output head")]


# --- the model and where it runs ----------------------------------------------------------------

Model: TypeAlias = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="demo (the built-in model), a local directory, a hub id, or id@revision.",
        autocompletion=_complete_model,
    ),
]
Device: TypeAlias = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:N]",
        help="Where to compute.",
        autocompletion=_complete_device,
    ),
]
DtypeName: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
Dtype: TypeAlias = Annotated[
    DtypeName,
    typer.Option(
        "--dtype",
        metavar="auto|float32|bfloat16|float16",
        help="What to compute in; auto follows the checkpoint and the device.",
    ),
]
Seed: TypeAlias = Annotated[
    int, typer.Option("--seed", min=0, metavar="N", help="Where random numbers start.")
]

# --- quantization and adapter -------------------------------------------------------------------

Rank: TypeAlias = Annotated[
    int, typer.Option("--rank", min=1, metavar="R", help="Rank of the adapter.")
]
BitsNumber: TypeAlias = Literal[4, 8]
Bits: TypeAlias = Annotated[
    BitsNumber, typer.Option("--bits", metavar="4|8", help="Bits of a quantized weight.")
]
Iterations: TypeAlias = Annotated[
    int,
    typer.Option(
        "--iterations",
        min=1,
        metavar="T",
        help="Alternations of quantization and SVD; the best of them is kept.",
    ),
]
TargetModules: TypeAlias = Annotated[
    str,
    typer.Option(
        "--target-modules",
        metavar="a,b|all-linear",
        help="Layers that get an adapter, by the end of their names, or all but the output head.",
        autocompletion=_complete_targets,
    ),
]
LoraAlpha: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--lora-alpha",
        metavar="X",
        show_default="the rank",
        help="LoRA's scaling is X / rank; any X starts equally well.",
    ),
]
RsLora: TypeAlias = Annotated[
    bool, typer.Option("--rslora", help="Scale by X / √rank (rank-stabilized LoRA).")
]
InitName: TypeAlias = Literal["loftq", "qlora"]
Init: TypeAlias = Annotated[
    InitName,
    typer.Option(
        "--init",
        metavar="loftq|qlora",
        help="How the adapter starts: loftq corrects the quantization error, qlora is zero.",
    ),
]
QuantTypeName: TypeAlias = Literal["nf4", "fp4"]
QuantType: TypeAlias = Annotated[
    QuantTypeName,
    typer.Option("--quant-type", metavar="nf4|fp4", help="The 4-bit data type."),
]
BlockSize: TypeAlias = Annotated[
    int,
    typer.Option(
        "--block-size",
        metavar="N",
        help="Weights that share one scale: 32, 64, … 4096.",
        autocompletion=lambda: [str(2**n) for n in range(5, 13)],
    ),
]
DoubleQuant: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--double-quant/--no-double-quant", help="Quantize the scales too: 0.4 bits less a weight."
    ),
]

TrustRemoteCode: TypeAlias = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the Python code that comes with the model."),
]

# --- output -------------------------------------------------------------------------------------

Output: TypeAlias = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="The directory to write."),
]
DryRun: TypeAlias = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be written; write nothing.")
]
Resume: TypeAlias = Annotated[
    bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")
]
Force: TypeAlias = Annotated[
    bool, typer.Option("--force", help="Replace the output if it is there.")
]

# --- generation ---------------------------------------------------------------------------------

Prompt: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue; repeatable."),
]
MaxNewTokens: TypeAlias = Annotated[
    int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Tokens to write at most.")
]

# --- what every command has ---------------------------------------------------------------------

FormatName: TypeAlias = Literal["auto", "table", "tsv", "json", "md"]
Format: TypeAlias = Annotated[
    FormatName,
    typer.Option(
        "--format",
        metavar="auto|table|tsv|json|md",
        help="How to print the result; auto is a table on a terminal and TSV in a pipe.",
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="The same as --format json.")]
Save: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--save", metavar="DIR", help="Also write the result into DIR, as JSON and as text."
    ),
]
Quiet: TypeAlias = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no notes; warnings stay.")
]
Debug: TypeAlias = Annotated[
    bool,
    typer.Option("--debug", help="Show tracebacks and what the libraries say (LOFTQ_DEBUG=1)."),
]


def split_list(text: str, option: str) -> list[str]:
    """`a,b` as ["a", "b"]; spaces around the commas do not count, an empty item is a mistake."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise UsageError(f"{option} has an empty item: {text!r}")
    return items
