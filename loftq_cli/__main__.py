"""`python -m loftq_cli`, and the entry point of the `loftq` command."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress


def main() -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        # Nothing has begun that would have to be cleaned up; `cli.main` has a better handler.
        signal.signal(signal.SIGINT, _end)
    from loftq_cli.cli import main as run

    sys.exit(run())


def _end(*_: object) -> None:
    with suppress(OSError):
        os.write(2, b"error: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
