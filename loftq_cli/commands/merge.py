"""`loftq merge`: a trained adapter in the weights that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from loftq_cli.commands.run import Run, command
from loftq_cli.commands.spellings import option
from loftq_cli.options import refuse_both


@command(
    "merge",
    directory=Annotated[
        Path, typer.Argument(metavar="DIR", help="What loftq quantize --output wrote.")
    ],
    adapter=option(
        Path | None,
        "--adapter",
        metavar="DIR",
        help="What PEFT saved after the training.",
        show_default="the start in DIR",
    ),
    dtype=option(
        Literal["auto", "float32", "bfloat16", "float16"],
        "--dtype",
        metavar="auto|float32|bfloat16|float16",
        help="What to write; auto is the model's own.",
    ),
)
def merge(
    run: Run,
    directory: Path,
    output: Path,
    adapter: Path | None = None,
    dtype: str = "auto",
    resume: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """
    \b
    loftq merge OUT --adapter TRAINED --output MERGED

    Folds an adapter that was trained on OUT into the weights of OUT, dequantized: an ordinary model
    in 16 bits, which any tool loads without an adapter. (Folded into the original weights, as most
    tools do it, the adapter would add the error that it corrects.) An adapter of another base, or
    one that cannot be folded in exactly, is refused.
    """
    refuse_both(force=force, resume=resume)
    from loftq_cli.engines.merge import merge_directory

    run.emit(
        merge_directory(
            run,
            directory,
            adapter,
            output,
            dtype=None if dtype == "auto" else dtype,
            resume=resume,
            force=force,
            trust_remote_code=trust_remote_code,
        )
    )
