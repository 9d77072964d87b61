"""How the options of every command are spelled, what their help says, and what completes them.

A command has the options that its parameters are named after: ``def load(run: Run, model: str =
"demo")`` takes --model. The table says how it is spelled, the command says its default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from loftq_cli import starts
from loftq_cli.containers import container_names, widths
from loftq_cli.formats import (
    ALL_LINEAR,
    BLOCK_SIZES,
    AdapterDtype,
    CalibrationOrder,
    EngineName,
    Experts,
    QuantStorage,
    QuantType,
    SvdMethod,
)
from loftq_cli.options import LARGEST_RANK, LARGEST_SEED

_MOST = 10**9  # sequences, tokens: beyond it a number is no longer one of this world
FormatName: TypeAlias = Literal["auto", "table", "tsv", "json", "md", "html"]


def _complete_model(incomplete: str) -> Iterator[str]:
    """The built-in model, directories, and what the Hugging Face cache already holds."""
    from loftq_cli.models.spec import cache_directory

    yield "demo"
    base = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent)
    prefix = "./" if incomplete.startswith("./") and str(base) == "." else ""
    with suppress(OSError):
        yield from (f"{prefix}{each}/" for each in base.iterdir() if each.is_dir())
    for each in cache_directory().glob("models--*"):
        yield each.name.removeprefix("models--").replace("--", "/")


def option(kind: Any, *spellings: str, **about: Any) -> Any:
    """What Typer wants to know of one option."""
    return Annotated[kind, typer.Option(*spellings, **about)]


OPTIONS = {
    # --- the model and where it runs -------------------------------------------------------------
    "model": option(
        str,
        "--model",
        "-m",
        metavar="MODEL",
        help="demo (the built-in model), a local directory, a hub id, or id@revision.",
        autocompletion=_complete_model,
    ),
    "device": option(
        str,
        "--device",
        metavar="auto|cpu|cuda[:N]",
        help="Where to compute.",
        autocompletion=lambda: ["auto", "cpu", "cuda", "cuda:0"],
    ),
    "dtype": option(
        Literal["auto", "float32", "bfloat16", "float16"],
        "--dtype",
        metavar="auto|float32|bfloat16|float16",
        help="What to compute in; auto follows the checkpoint and the device.",
    ),
    "seed": option(
        int, "--seed", min=0, max=LARGEST_SEED, metavar="N", help="Where random numbers start."
    ),
    "trust_remote_code": option(
        bool, "--trust-remote-code", help="Run the Python code that comes with the model."
    ),
    # --- quantization and adapter ----------------------------------------------------------------
    "rank": option(
        int, "--rank", min=1, max=LARGEST_RANK, metavar="R", help="Rank of the adapter."
    ),
    "bits": option(
        str | None,
        "--bits",
        metavar="|".join([*map(str, widths()), "BxN,B"]),
        show_default="4",
        help="Bits of a quantized weight; 4x8,2 is 4 bits in the first 8 blocks and 2 in the rest. "
        "bitsandbytes stores 2 and 3 bits as 4.",
        autocompletion=lambda: [*map(str, widths())],
    ),
    "target_bits": option(
        float | None,
        "--target-bits",
        metavar="X",
        help="The average of the container's bits (2, 3, 4; of integers 8 too): each layer gets "
        "what it needs, as measured first.",
    ),
    "rank_budget": option(
        bool,
        "--rank-budget",
        help="As many parameters as --rank everywhere, spread over the layers to where a rank "
        "takes away the most error.",
    ),
    "uniform_rank": option(
        bool,
        "--uniform-rank",
        help="With --rank-budget: pad all ranks to the largest, for servers that know only one.",
    ),
    "ranks": option(str, "--ranks", metavar="R,R,…", help="Ranks to try, separated by commas."),
    "iterations": option(
        str,
        "--iterations",
        metavar="T|auto",
        help="Alternations of quantization and SVD, or until another hardly pays; the best of them "
        "is kept.",
        autocompletion=lambda: ["auto", "1", "5"],
    ),
    "svd": option(
        SvdMethod,
        "--svd",
        metavar="auto|exact|randomized",
        help="How low ranks are found; exact is LAPACK's full SVD, auto takes what is cheaper.",
    ),
    "target_modules": option(
        str,
        "--target-modules",
        metavar="a,b|all-linear",
        help="Layers that get an adapter, by the end of their names, or all but the output head; "
        "`all-linear,experts` is those and experts.",
        autocompletion=lambda: [(ALL_LINEAR, "every linear layer but the output head")],
    ),
    "lora_alpha": option(
        float | None,
        "--lora-alpha",
        metavar="X",
        show_default="the rank",
        help="LoRA's scaling is X / rank; any X starts equally well.",
    ),
    "rslora": option(bool, "--rslora", help="Scale by X / √rank (rank-stabilized LoRA)."),
    "init": option(
        Literal[tuple(starts.STARTS)],
        "--init",
        metavar="INIT",
        help=starts.help_text(),
        autocompletion=lambda: list(starts.STARTS),
    ),
    "calibration_text": option(
        Path | None,
        "--calibration-text",
        metavar="FILE",
        help="Text like that the model was made for; a few hundred kilobytes do.",
    ),
    "calibration_order": option(
        CalibrationOrder | None,
        "--calibration-order",
        metavar="sequential|parallel",
        help="Whose activations --init calibrated looks at: those that the quantized layers before "
        "leave, one after the other, or the original model's.",
        show_default="sequential",
    ),
    "distill_steps": option(
        int | None,
        "--distill-steps",
        min=1,
        metavar="N",
        help="Train the adapters on the calibration text in the end, N steps of 8 windows of 192 "
        "tokens, so that what the model predicts comes nearer to the original; 300 is a good "
        "number. Takes the whole model in memory, and that of its quantized weights beside it.",
        show_default="no training",
    ),
    "container": option(
        Literal[container_names()],
        "--container",
        metavar="|".join(container_names()),
        help="How the weights lie in files, which is who reads them: gptq to train with peft, "
        "compressed-tensors to serve with vLLM, both in true 2, 3, 4 or 8 bits; bitsandbytes.",
        autocompletion=lambda: [*container_names()],
    ),
    "quant_type": option(QuantType, "--quant-type", metavar="nf4|fp4", help="The 4-bit data type."),
    "block_size": option(
        int,
        "--block-size",
        metavar="N",
        help="Weights that share one scale: 32, 64, … 4096; in gptq and compressed-tensors 32, 64, "
        "128, or -1, a whole row.",
        autocompletion=lambda: [str(size) for size in BLOCK_SIZES],
    ),
    "double_quant": option(
        bool,
        "--double-quant/--no-double-quant",
        help="Quantize the scales too: 0.4 bits less a weight.",
    ),
    "quant_storage": option(
        QuantStorage,
        "--quant-storage",
        metavar="uint8|bfloat16|float16|float32",
        help="What the tensors of packed 4-bit codes are called, the bytes being the same: FSDP "
        "shards only the dtype that it trains in.",
    ),
    "experts": option(
        Experts | None,
        "--experts",
        metavar="quantize|keep",
        help="What becomes of the matrices of experts. compressed-tensors quantizes them unless "
        "told to keep them, and stacks that only loftq puts together again if told to. The others "
        "keep them, as plain transformers 5 cannot load them, and quantize them if told to: "
        "bitsandbytes in 4 bits for loftq_cli.load and transformers 4, gptq for gptqmodel.",
    ),
    "adapter_dtype": option(
        AdapterDtype,
        "--adapter-dtype",
        metavar="float32|bfloat16|float16",
        help="What the adapter is written in; errors are those of the rounded one.",
    ),
    "engine": option(
        EngineName,
        "--engine",
        metavar="local|ray",
        help="Who runs the tasks, an output file each: this machine, or a Ray cluster whose nodes "
        "share the file system.",
    ),
    "ray_address": option(
        str,
        "--ray-address",
        metavar="auto|local|HOST:PORT",
        help="Of the cluster's head; auto finds the one that this machine is part of, local starts "
        "one here.",
        autocompletion=lambda: ["auto", "local"],
    ),
    "workers": option(
        int | None,
        "--workers",
        min=1,
        max=1024,
        metavar="N",
        help="Make as many output files at once, each in a process of its own with its share of "
        "the threads; calibrated starts, as many layers.",
        show_default="1, or one for each GPU of --device",
    ),
    "max_memory": option(
        str | None,
        "--max-memory",
        metavar="SIZE",
        help="Stay within so much memory on the CPU, such as 4GB or 900MB, at the price of time; "
        "exit 4 before starting if that cannot be.",
    ),
    "stream": option(
        bool,
        "--stream",
        help="Read the weights straight from the hub by range requests; none of them are kept on "
        "this disk.",
    ),
    # --- what fine-tuning takes ------------------------------------------------------------------
    "batch_size": option(
        int, "--batch-size", min=1, max=_MOST, metavar="N", help="Sequences in one training step."
    ),
    "sequence_length": option(
        int | None,
        "--sequence-length",
        min=1,
        max=_MOST,
        metavar="N",
        help="Tokens in a sequence.",
        show_default="1024, or the model's own limit",
    ),
    "vram": option(
        str | None,
        "--vram",
        metavar="SIZE",
        help="Memory of the GPU, such as 24GB or 22.5GiB: mark what fits, exit 4 if nothing does.",
    ),
    "error": option(
        bool, "--error", help="Read the weights and measure the LoftQ error at every rank."
    ),
    "preflight": option(
        bool,
        "--preflight",
        help="Ask the model class, the library that loads it and PEFT which layers they take, "
        "instead of going by names: some seconds.",
    ),
    # --- output ----------------------------------------------------------------------------------
    "output": option(Path | None, "--output", "-o", metavar="DIR", help="The directory to write."),
    "dry_run": option(bool, "--dry-run", help="Say what would be written; write nothing."),
    "resume": option(
        bool,
        "--resume",
        help="Accept an output that is already complete; interrupted runs go on by themselves.",
    ),
    "force": option(bool, "--force", help="Replace the output if it is there."),
    "verify": option(
        bool, "--verify", help="Prove the output when it is complete, as loftq verify does."
    ),
    "push_to_hub": option(
        str | None,
        "--push-to-hub",
        metavar="ID",
        help="Upload the complete output to this repository of the Hugging Face hub, as loftq push "
        "does.",
    ),
    "private": option(bool, "--private", help="Only the owners of the new repository see it."),
    # --- generation ------------------------------------------------------------------------------
    "prompt": option(
        list[str] | None, "--prompt", "-p", metavar="TEXT", help="Text to continue; repeatable."
    ),
    "max_new_tokens": option(
        int, "--max-new-tokens", min=1, max=_MOST, metavar="N", help="Tokens to write at most."
    ),
    # --- what every command has ------------------------------------------------------------------
    "format": option(
        FormatName,
        "--format",
        metavar="auto|table|tsv|json|md|html",
        help="How to print the result; auto is a table on a terminal and TSV in a pipe.",
    ),
    "json": option(bool, "--json", help="The same as --format json."),
    "save": option(
        Path | None,
        "--save",
        metavar="DIR",
        help="Also write the result into DIR, as JSON and as text.",
    ),
    "html": option(
        Path | None,
        "--html",
        metavar="FILE",
        help="Also write the result as a page for a browser: pictures, tables, no network.",
    ),
    "quiet": option(bool, "--quiet", "-q", help="No progress and no notes; warnings stay."),
    "debug": option(
        bool, "--debug", help="Show tracebacks and what the libraries say (LOFTQ_DEBUG=1)."
    ),
}
