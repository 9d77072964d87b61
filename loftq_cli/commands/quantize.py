"""`loftq quantize`: a checkpoint becomes a packed backbone with its LoftQ adapter."""

from __future__ import annotations

from typing import Literal

from loftq_cli.api import push_quantized, run_quantize
from loftq_cli.commands.run import Run, command
from loftq_cli.commands.spellings import option
from loftq_cli.options import QuantizeOptions


@command(
    "quantize",
    device=option(
        str,
        "--device",
        metavar="auto|cpu|cuda[:N]|cuda:all",
        help="Where to compute; cuda:all is every GPU, cuda:0,cuda:1 are two.",
        autocompletion=lambda: ["auto", "cpu", "cuda", "cuda:0", "cuda:all"],
    ),
    dtype=option(
        Literal["auto", "float32", "bfloat16", "float16"],
        "--dtype",
        metavar="auto|float32|bfloat16|float16",
        help="What all that is not quantized is written and computed in; auto keeps the "
        "checkpoint's. float16 is for cards without bfloat16 (T4, V100, RTX 20).",
    ),
)
def quantize(run: Run, asked: QuantizeOptions) -> None:
    """
    \b
    loftq quantize --model org/name --output OUT
    loftq quantize --output OUT                      (the built-in model)
    loftq quantize --model org/name --dry-run --json | jq .results.totals

    Writes a packed 4-bit backbone and a LoRA adapter that starts where the two together are
    closest to the original: a directory that plain transformers and peft load.
    """
    from loftq_cli.checks.written.certify import require_passed

    document, certificate = run_quantize(asked, run)
    run.emit(document)
    if certificate is not None:
        require_passed(certificate, document)
    push_quantized(asked, run)
