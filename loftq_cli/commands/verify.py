"""`loftq verify`: a written directory, opened as its users will open it, and proved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from loftq_cli.commands.run import Run, command
from loftq_cli.commands.spellings import option


@command(
    "verify",
    directory=Annotated[
        Path, typer.Argument(metavar="DIR", help="What loftq quantize --output wrote.")
    ],
    source=option(
        str | None,
        "--source",
        metavar="MODEL",
        help="The model it was made from: a directory, or a hub id in the cache.",
        show_default="as the report names it",
    ),
    sample=option(
        int | None,
        "--sample",
        min=1,
        metavar="N",
        help="Measure N layers against the source, spread over the model.",
        show_default="all",
    ),
    dtype=option(
        Literal["auto", "float32", "bfloat16", "float16"],
        "--dtype",
        metavar="auto|float32|bfloat16|float16",
        help="Load it with this dtype for the forward pass; auto loads it as its README says.",
    ),
)
def verify(
    run: Run,
    directory: Path,
    source: str | None = None,
    sample: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """
    \b
    loftq verify OUT
    loftq verify OUT --source ./original --sample 20
    loftq verify OUT --json > certificate.json

    Opens what quantize wrote and holds it against its own report: the hash of every file, every
    layer as bitsandbytes dequantizes it, the adapter as PEFT loads it, totals; against the
    original: residuals, and all that was only copied; a forward pass. Nothing is downloaded. With
    a failure the exit code is 3.
    """
    from loftq_cli.checks.written.certify import require_passed, verify_directory

    document = verify_directory(run, directory, source, sample, device, dtype, trust_remote_code)
    run.emit(document)
    require_passed(document.results, document)
