"""`python -m loftq_cli`, and the entry point of the `loftq` command."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from loftq_cli.cli import main as run
    except KeyboardInterrupt:  # so early that nobody else could catch it
        sys.exit(130)
    sys.exit(run())


if __name__ == "__main__":
    main()
