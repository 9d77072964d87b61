"""The options of every command, spelled once.

A command picks from these by annotation: ``def load(run: Run, model: Model = "demo", ...)``.
The type says how it is spelled, the command says its default.
"""

from __future__ import annotations

import os
import re
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
Ranks: TypeAlias = Annotated[
    str, typer.Option("--ranks", metavar="R,R,…", help="Ranks to try, separated by commas.")
]
HeldBitsNumber: TypeAlias = Literal[4, 8, 16]
HeldBits: TypeAlias = Annotated[
    HeldBitsNumber,
    typer.Option(
        "--bits", metavar="4|8|16", help="Bits of a weight while fine-tuning; 16 is plain LoRA."
    ),
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
SvdName: TypeAlias = Literal["auto", "exact", "randomized"]
Svd: TypeAlias = Annotated[
    SvdName,
    typer.Option(
        "--svd",
        metavar="auto|exact|randomized",
        help="How low ranks are found; exact is LAPACK's full SVD, auto takes what is cheaper.",
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

# --- what fine-tuning takes ---------------------------------------------------------------------

BatchSize: TypeAlias = Annotated[
    int, typer.Option("--batch-size", min=1, metavar="N", help="Sequences in one training step.")
]
SequenceLength: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--sequence-length",
        min=1,
        metavar="N",
        help="Tokens in a sequence.",
        show_default="1024, or the model's own limit",
    ),
]
MaxMemory: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Stay within so much memory on the CPU, such as 4GB or 900MB, at the price of time; "
        "exit 4 before starting if that cannot be.",
    ),
]
Vram: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--vram",
        metavar="SIZE",
        help="Memory of the GPU, such as 24GB or 22.5GiB: mark what fits, exit 4 if nothing does.",
    ),
]
MeasureError: TypeAlias = Annotated[
    bool,
    typer.Option("--error", help="Read the weights and measure the LoftQ error at every rank."),
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
    bool,
    typer.Option(
        "--resume",
        help="Accept an output that is already complete; interrupted runs go on by themselves.",
    ),
]
Force: TypeAlias = Annotated[
    bool, typer.Option("--force", help="Replace the output if it is there.")
]
Verify: TypeAlias = Annotated[
    bool,
    typer.Option("--verify", help="Prove the output when it is complete, as loftq verify does."),
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


def ranks(text: str) -> list[int]:
    """The value of --ranks: positive whole numbers, in the order given, each once."""
    items = split_list(text, "--ranks")
    if not all(item.isascii() and item.isdigit() and int(item) > 0 for item in items):
        raise UsageError(f"--ranks takes positive whole numbers, not {text!r}")
    return list(dict.fromkeys(int(item) for item in items))


_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def size(text: str, option: str, *, plain_bytes: bool = False) -> int:
    """`24GB` as 24·10⁹, `24GiB` as 24·2³⁰ bytes; ``plain_bytes`` may be a number without unit."""
    stripped = text.strip().upper()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT]I?B)", stripped, re.ASCII)
    if plain_bytes and re.fullmatch(r"0*[1-9]\d{0,18}", stripped, re.ASCII):
        return int(stripped)
    count = 0 if match is None else float(match[1]) * _UNITS[match[2]]
    if not 1 <= count < 2**63:
        raise UsageError(f"{option} takes a size such as 24GB or 22.5GiB, not {text!r:.80}")
    return int(count)
