"""`python -m loftq_cli`, and the entry point of the `loftq` command."""

from __future__ import annotations

import gc
import os
import signal
import sys
from contextlib import suppress


def main() -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        # Nothing has begun that would have to be cleaned up; `cli.main` has a better handler.
        signal.signal(signal.SIGINT, _end)
    from loftq_cli.cli import main as run

    code = run()
    # Where all is given back to the system, nobody has to look for garbage in it first, which takes
    # a second with all libraries.
    gc.freeze()
    # Python ends itself by SIGINT, whatever the exit code, if Ctrl-C ever came out of code given to
    # `exec` as text, as libraries do while they are imported. The next such code makes it forget.
    exec("")
    sys.exit(code)


def _end(*_: object) -> None:
    with suppress(OSError):
        os.write(2, b"error: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
