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
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from loftq_cli import formats, starts
from loftq_cli.errors import UsageError
from loftq_cli.formats import ALL_LINEAR, BLOCK_SIZES, SvdMethod
from loftq_cli.starts import STARTS


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
    return [(ALL_LINEAR, "every linear layer but the output head")]


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
Bits: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--bits",
        metavar="2|3|4|8|BxN,B",
        show_default="4",
        help="Bits of a quantized weight; 4x8,2 is 4 bits in the first 8 blocks and 2 in the rest. "
        "2 and 3 bits are stored in the 4-bit container.",
        autocompletion=lambda: ["2", "3", "4", "8"],
    ),
]
TargetBits: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--target-bits",
        metavar="X",
        help="The average of 2, 3 and 4 bits: each layer gets what it needs, as measured first.",
    ),
]
RankBudget: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--rank-budget",
        help="As many parameters as --rank everywhere, spread over the layers to where a rank "
        "takes away the most error.",
    ),
]
UniformRank: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--uniform-rank",
        help="With --rank-budget: pad all ranks to the largest, for servers that know only one.",
    ),
]
Ranks: TypeAlias = Annotated[
    str, typer.Option("--ranks", metavar="R,R,…", help="Ranks to try, separated by commas.")
]
HeldBitsNumber: TypeAlias = Literal[2, 3, 4, 8, 16]
HeldBits: TypeAlias = Annotated[
    HeldBitsNumber,
    typer.Option(
        "--bits",
        metavar="2|3|4|8|16",
        help="Bits of a weight while fine-tuning; 2 and 3 take the memory of 4, 16 is plain LoRA.",
    ),
]
Iterations: TypeAlias = Annotated[
    str,
    typer.Option(
        "--iterations",
        metavar="T|auto",
        help="Alternations of quantization and SVD, or until another hardly pays; the best of them "
        "is kept.",
        autocompletion=lambda: ["auto", "1", "5"],
    ),
]
Svd: TypeAlias = Annotated[
    SvdMethod,
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
if TYPE_CHECKING:
    InitName: TypeAlias = str
else:
    InitName = Literal[tuple(STARTS)]
Init: TypeAlias = Annotated[
    InitName,
    typer.Option(
        "--init",
        metavar="INIT",
        help=starts.help_text(),
        autocompletion=lambda: list(STARTS),
    ),
]
CalibrationText: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--calibration-text",
        metavar="FILE",
        help="Text like that the model was made for; a few hundred kilobytes do.",
    ),
]
QuantType: TypeAlias = Annotated[
    formats.QuantType,
    typer.Option("--quant-type", metavar="nf4|fp4", help="The 4-bit data type."),
]
BlockSize: TypeAlias = Annotated[
    int,
    typer.Option(
        "--block-size",
        metavar="N",
        help="Weights that share one scale: 32, 64, … 4096.",
        autocompletion=lambda: [str(size) for size in BLOCK_SIZES],
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


def iterations(text: str) -> int | None:
    """The value of --iterations: a positive whole number, or None for auto."""
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 1000):
        raise UsageError(f"--iterations takes auto or a number from 1 to 1000, not {text!r:.80}")
    return int(text)


def bits(text: str) -> tuple[int, tuple[int, int] | None]:
    """`4` as (4, None), and `4x8,2` as (2, (8, 4)): 4 bits in the first 8 blocks, then 2."""
    if text in ("2", "3", "4", "8"):
        return int(text), None
    match = re.fullmatch(r"([234])x(\d{1,4}),([234])", text, re.ASCII)
    if match is None:
        raise UsageError(
            f"--bits {text!r:.80} is not supported",
            hint="--bits 2, 3, 4 or 8, or --bits 4x8,2 for 4 bits in the first 8 blocks and then 2",
        )
    return int(match[3]), (int(match[2]), int(match[1]))


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
