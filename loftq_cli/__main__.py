"""`python -m loftq_cli`, and the entry point of the `loftq` command."""

from __future__ import annotations

import sys


def main() -> None:
    from loftq_cli.cli import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
