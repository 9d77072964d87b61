"""The `loftq` command: which commands there are, and what becomes of an error.

Every way a run can end passes through `main`: a message on stderr and an exit code, made here and
nowhere else.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from loftq_cli import __version__
from loftq_cli.commands.run import Invocation
from loftq_cli.console import Console
from loftq_cli.errors import DoesNotFit, LoftqError
from loftq_cli.signals import Signals, Terminated

# Each with its line in `loftq --help`. A command is the function of its name, in the module of its
# name in `loftq_cli.commands`.
COMMANDS = {
    "quantize": "Write a 4-bit backbone and its LoftQ adapter into one directory.",
    "load": "Load a model for real: parameters, bytes, seconds, peak memory.",
    "sweep-ranks": "Show what every rank trains, and the memory that fine-tuning takes.",
    "targets": "List the linear layers, and what adapting which of them would cost.",
    "generate": "Continue prompts with the model and its adapter, and time it.",
    "compare": "Hold starts, bits and ranks against the original model, and say what they gain.",
    "check": "Test this box and a model on it, kernels first; exit 3 if anything fails.",
    "verify": "Prove a directory that quantize wrote, file by file; exit 3 if anything fails.",
    "export": "Write the same integer codes and scales in another container, nothing rounded.",
    "merge": "Fold a trained adapter into the dequantized weights: a plain model in 16 bits.",
    "push": "Upload a directory that quantize or export wrote to the Hugging Face hub.",
    "report": "Put result documents together: systems, results, findings, recommendations.",
}

HELP = """
\b
loftq quantize --model demo --output OUT
loftq generate --model OUT --prompt "def main"

Quantizes a language model and starts its LoRA adapters where the quantization error is smallest,
so that fine-tuning in little memory starts from the original model, not from a damaged one.
"""

EPILOG = """
\b
Exit codes:
  0    done
  1    failed
  2    the command line is wrong
  3    a check that was asked for failed
  4    does not fit in memory or on disk
  130  interrupted with Ctrl-C
  143  terminated

The result goes to stdout: a table on a terminal, tab-separated values in a pipe, one document with
--json. Everything else goes to stderr. NO_COLOR, FORCE_COLOR and COLUMNS are honoured.
"""


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _LazyGroup(TyperGroup):
    """A group that imports a command when it is called, not when it is listed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = dict.fromkeys(COMMANDS, cast(Any, None))  # what a misspelling may mean

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        body = getattr(importlib.import_module(f"loftq_cli.commands.{name}"), name)
        single = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=CONTEXT)
        single.command(cmd_name, short_help=COMMANDS[cmd_name])(body)
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


# Plain help: Rich would take as long to import as everything else here, and its markup would eat
# the brackets of "cuda[:N]".
app = typer.Typer(
    name="loftq",
    cls=_LazyGroup,
    rich_markup_mode=None,
    context_settings=CONTEXT,
    help=HELP,
    epilog=EPILOG,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"loftq {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        # Not a result, so not for stdout: in `loftq | jq` it is the mistake that must show.
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    if "_LOFTQ_COMPLETE" in os.environ:
        app(prog_name="loftq")  # a shell asks for completions; Typer answers and exits
    # Threads that spin while they wait make torch up to a hundred times slower on a machine that
    # does something else too. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console()
    signals = Signals()
    try:
        with signals:
            code = _dispatch(arguments, console)
            # Some library swallowed it; whoever sent it must not take this for a finished run.
            return code if signals.heard is None else _explain(signals.heard, arguments, console)
    except BaseException as error:
        # Once a signal was heard, an error is what some library made of it.
        return _explain(signals.heard or error, arguments, console)
    finally:
        _flush()


def _dispatch(arguments: list[str], console: Console) -> int:
    # Not `app()`: it would put Ctrl-C, a broken pipe and a usage error into its own words.
    command = typer.main.get_command(app)
    invocation = Invocation([_printable(each) for each in arguments], console)
    try:
        with command.make_context("loftq", arguments, obj=invocation) as context:
            command.invoke(context)
    except typer.Exit as exit:
        return int(exit.exit_code)
    return 0


def _explain(error: BaseException, arguments: list[str], console: Console) -> int:
    """The message for an error, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        console.error("interrupted")
        return 130
    if isinstance(error, Terminated):
        console.error("terminated")
        return 143
    if not console.has_claimed_stdout:
        # No command has begun: this is Typer printing help or a completion script.
        if isinstance(error, BrokenPipeError):
            return 0
        if isinstance(error, SystemExit):
            return int(error.code or 0)
    console.trace()  # if it is wanted; before the rest, since what helps stands last
    if isinstance(error, LoftqError):
        console.error(error.what, error.cause, error.hint)
        return error.exit_code
    if isinstance(error, _PARSE_ERROR):
        message = " ".join(error.format_message().split()).rstrip(".")
        command = [each for each in arguments[:1] if each in COMMANDS]
        hint = " ".join(["loftq", *command, "--help"])
        console.error(message[:1].lower() + message[1:], hint=hint)
        return int(error.exit_code)
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        console.error("the disk is full", cause=text, hint="make room, then run it again")
        return DoesNotFit.exit_code
    # torch has an error of its own for a GPU, and none for the CPU.
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate" in text:
        console.error(
            "out of memory", cause=text, hint="free some memory, or use a box that has more"
        )
        return DoesNotFit.exit_code
    console.error(
        f"unexpected {kind}: {text}" if text else f"unexpected {kind}",
        hint=None if console.debug else "run it again with --debug to see where it happened",
    )
    return 1


# What the parser raises. The class has no public name of its own; its public child has.
_PARSE_ERROR: Any = typer.BadParameter.__base__


def _flush() -> None:
    """Flushes what libraries printed; a reader that is gone must not make the exit fail."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _printable(argument: str) -> str:
    """The argument without lone surrogates, which JSON text cannot carry."""
    return argument.encode("utf-8", "backslashreplace").decode("utf-8")
