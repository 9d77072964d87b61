"""Commands that exist only here, for what the real ones should never do.

Run as a program it is `loftq` with these commands added.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from loftq_cli import cli
from loftq_cli.commands.run import Run, command
from loftq_cli.commands.spellings import option
from loftq_cli.errors import CheckFailed, DoesNotFit, LoftqError
from loftq_cli.schema import LoadResults, ModelIdentity

EVIL = "layer[red]evil[/]\x1b[31m\u202e|`x`\ttail"


def results(**changes: object) -> LoadResults:
    values: dict[str, object] = {
        "architecture": "Fake",
        "parameters": 1000,
        "parameter_bytes": 4000,
        "bytes_by_dtype": {"float32": 4000},
        "load_seconds": 1.5,
        "peak_memory_bytes": 2_000_000,
        "device": "cpu",
        "dtype": "float32",
    }
    return LoadResults.model_validate(values | changes)


def finish(run: Run, model: str, **changes: object) -> None:
    run.finish(results(**changes), model=ModelIdentity(id=model, source="demo"))


@command("load")
def noisy(run: Run, model: str = "demo") -> None:
    """
    \b
    loftq noisy

    Print from Python, to the descriptor, from C and from a child, around a result.
    """
    import ctypes

    print("printed")
    os.write(1, b"written to descriptor 1\n")
    subprocess.run(["echo", "echoed by a child"], check=True)
    sys.stdout.write("left in Python's buffer")
    if os.name == "posix":
        ctypes.CDLL(None).printf(b"left in C's buffer\n")
    names = [f"layer.{number}" for number in range(20)]
    with run.timing("read"), run.progress("reading", len(names)) as progress:
        for name in names:
            progress.start(name)
            progress.advance(name)
    run.note("a note")
    run.warn(f"beware of {EVIL}")
    run.resolved("device", "cpu", "auto: nothing else is here")
    finish(run, model)


@command("load", marker=option(Path))
def sleepy(run: Run, marker: Path) -> None:
    """Wait to be stopped, and clean up."""
    try:
        marker.write_text("started")
        time.sleep(30)
    finally:
        marker.unlink(missing_ok=True)


@command("load", number=option(int))
def deaf(run: Run, number: int) -> None:
    """Get a signal while an object is collected, where Python drops what its handler raises."""

    class Collected:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    Collected()
    time.sleep(30)


@command("load", how=option(str))
def swallowing(run: Run, how: str) -> None:
    """Get a signal in code that catches whatever is raised, as some libraries do on import."""
    try:
        os.kill(os.getpid(), int(os.environ["NUMBER"]))
        time.sleep(1)
    except BaseException as error:
        if how == "other":
            raise ImportError("no module of this name") from error
    if how == "finishes":
        finish(run, "demo")
        return
    try:
        time.sleep(30)
    finally:
        # Long enough to be sent another one, which must not get in here.
        time.sleep(0.3)
        os.write(2, b"cleaned up\n")


FAILURES = {
    "loftq": LoftqError("it broke", cause="it was old", hint="loftq load --model demo"),
    "bare": LoftqError("it broke"),
    "check": CheckFailed("cuda was expected"),
    "fit": DoesNotFit("too large"),
    "unexpected": RuntimeError("first line\nsecond line"),
    "exit": SystemExit(0),
    "memory": MemoryError(),
    "disk": OSError(28, "No space left on device", "/x"),
    "child-pipe": BrokenPipeError(32, "Broken pipe"),
    "evil": LoftqError(f"no layer {EVIL}"),
}


@command("load", how=option(str))
def failing(run: Run, how: str) -> None:
    """Fail in the way that is asked for."""
    raise FAILURES[how]


@command("load")
def late(run: Run) -> None:
    """Print a result and then find that a check failed."""
    finish(run, "demo")
    raise CheckFailed("cuda was expected", cause="there is none")


@command("load")
def nan(run: Run) -> None:
    """Compute nonsense."""
    finish(run, "demo", load_seconds=float("nan"))


COMMANDS = {
    name: f"The {name} fake."
    for name in ("noisy", "sleepy", "deaf", "swallowing", "failing", "late", "nan")
}
# Where `loftq` looks for commands of these names.
for _name in COMMANDS:
    sys.modules[f"loftq_cli.commands.{_name}"] = sys.modules[__name__]

if __name__ == "__main__":
    cli.COMMANDS.update(COMMANDS)
    sys.exit(cli.main())
