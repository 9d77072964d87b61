"""`loftq push`: a written directory goes to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loftq_cli.commands.run import Run, command
from loftq_cli.commands.spellings import option


@command(
    "push",
    directory=Annotated[
        Path, typer.Argument(metavar="DIR", help="What loftq quantize --output wrote.")
    ],
    repository=Annotated[
        str, typer.Argument(metavar="ID", help="The repository, NAMESPACE/NAME; made if need be.")
    ],
    force=option(
        bool,
        "--force",
        help="Write to a repository that has something else in it: what loftq wrote there is "
        "replaced, the rest stays.",
    ),
)
def push(
    run: Run, directory: Path, repository: str, private: bool = False, force: bool = False
) -> None:
    """
    \b
    loftq push OUT your-name/your-model
    loftq push OUT your-name/your-model --private --json | jq -r .results.url

    Uploads the files that the report in OUT lists, each held against its hash before anything is
    sent, in one commit. README, adapter config and report name the repository there, so that
    from_pretrained(ID) loads it and `loftq verify` proves a download. The login is that of `hf auth
    login`. What was interrupted goes on when it is run again.
    """
    from loftq_cli.engines.push import push as push_directory
    from loftq_cli.engines.report_file import read_report

    report = read_report(directory)
    results = push_directory(run, directory, report, repository, private=private, force=force)
    run.finish(results, model=report.model)
