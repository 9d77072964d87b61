"""`loftq export`: the same codes and scales in another container."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from loftq_cli.commands.run import Run, command
from loftq_cli.commands.spellings import option
from loftq_cli.containers import container_names
from loftq_cli.options import refuse_both


@command(
    "export",
    directory=Annotated[
        Path, typer.Argument(metavar="DIR", help="What loftq quantize --output wrote.")
    ],
    container=option(
        # Of the others it is said why not.
        Literal[container_names()],
        "--container",
        metavar="gptq|compressed-tensors",
        help="The container to write: gptq to train with peft, compressed-tensors to serve with "
        "vLLM.",
        autocompletion=lambda: ["gptq", "compressed-tensors"],
    ),
)
def export(
    run: Run,
    directory: Path,
    container: str,
    output: Path,
    resume: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """
    \b
    loftq export OUT --container compressed-tensors --output SERVED

    Writes the codes and scales of OUT in the other container of integers: gptq to train with peft,
    compressed-tensors to serve with vLLM. Nothing is rounded, so backbone and adapter are what they
    were. Every file is held against the hash that the report in OUT has of it.
    """
    refuse_both(force=force, resume=resume)
    from loftq_cli.engines.export import export_directory

    run.emit(
        export_directory(
            run,
            directory,
            container,
            output,
            resume=resume,
            force=force,
            trust_remote_code=trust_remote_code,
        )
    )
