"""`loftq merge`: a trained adapter in the weights that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from loftq_cli.commands.run import Run, command
from loftq_cli.commands.spellings import option
from loftq_cli.containers import container_names, widths
from loftq_cli.errors import UsageError
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
    requantize=option(
        bool,
        "--requantize",
        help="Quantize the merged weights again, and measure what that costs. The result has no "
        "adapter.",
    ),
    container=option(
        Literal[container_names()] | None,
        "--container",
        metavar="|".join(container_names()),
        help="With --requantize: the container to write.",
        show_default="that of DIR",
    ),
    bits=option(
        int | None,
        "--bits",
        metavar="|".join(map(str, widths())),
        help="With --requantize: bits of every layer.",
        show_default="those of DIR",
    ),
    block_size=option(
        int | None,
        "--block-size",
        metavar="N",
        help="With --requantize: weights that share a scale.",
        show_default="that of DIR",
    ),
)
def merge(
    run: Run,
    directory: Path,
    output: Path,
    adapter: Path | None = None,
    dtype: str = "auto",
    requantize: bool = False,
    container: str | None = None,
    bits: int | None = None,
    block_size: int | None = None,
    resume: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """
    \b
    loftq merge OUT --adapter TRAINED --output MERGED
    loftq merge OUT --adapter TRAINED --requantize --output SMALL

    Folds an adapter that was trained on OUT into the weights of OUT, dequantized: an ordinary model
    in 16 bits, which any tool loads without an adapter. (Folded into the original weights, as most
    tools do it, the adapter would add the error that it corrects.) An adapter of another base, or
    one that cannot be folded in exactly, is refused.
    """
    refuse_both(force=force, resume=resume)
    more: dict[str, Any] = {
        "dtype": None if dtype == "auto" else dtype,
        "resume": resume,
        "force": force,
        "trust_remote_code": trust_remote_code,
    }
    if not requantize:
        if (container, bits, block_size) != (None, None, None):
            raise UsageError(
                "--container, --bits and --block-size say how to quantize again",
                hint="add --requantize",
            )
        from loftq_cli.engines.merge import merge_directory

        run.emit(merge_directory(run, directory, adapter, output, **more))
        return
    from loftq_cli.engines.requantize import requantize_directory
    from loftq_cli.engines.requantize_plan import Asked

    asked = Asked(container, bits, block_size)
    run.emit(requantize_directory(run, directory, adapter, output, asked, **more))
