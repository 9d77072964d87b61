"""The one place that writes: the result to stdout, everything else to stderr.

`Console.claim_stdout` takes the real stdout aside and points file descriptor 1 at stderr. From then
on no library, no C code and no child process can reach the real stdout; only `write_result` does.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from loftq_cli.errors import DoesNotFit, LoftqError
from loftq_cli.record import Listener, Progress
from loftq_cli.report.escape import visible

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.live import Live
    from rich.progress import Progress as RichProgress

    _Shown = TypeVar("_Shown", RichProgress, Live)

PLAIN_PROGRESS_SHARE = 0.1
PLAIN_PROGRESS_SECONDS = 30.0
LIVE_SECONDS = 0.1
_LONGEST_LINE = 4000  # of a message: a path has 4096 bytes at most, and is hardly ever as long

_STYLES = {"error": "1;31", "warning": "33", "cause": "2", "hint": "36", "note": "2"}


def wants_colour(is_terminal: bool, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether escape codes may be written there. An empty variable counts as unset."""
    if environ.get("NO_COLOR"):
        return False
    if environ.get("FORCE_COLOR"):
        return True
    return is_terminal and environ.get("TERM") != "dumb"


def width_of(descriptor: int, environ: Mapping[str, str] = os.environ) -> int:
    """Columns to lay out for: COLUMNS, else the terminal's own, else 80."""
    columns = environ.get("COLUMNS", "")
    if re.fullmatch(r"0*[1-9]\d{0,3}", columns, re.ASCII):  # wider is no screen
        return int(columns)
    try:
        return os.get_terminal_size(descriptor).columns or 80
    except OSError:
        return 80


class Console(Listener):
    """One run's way out. `quiet` drops progress and notes; warnings and errors stay."""

    def __init__(self) -> None:
        self.quiet = False
        self.debug = bool(os.environ.get("LOFTQ_DEBUG"))
        self._result: int | None = None
        self._bar: RichProgress | Live | None = None

    # --- stdout ---------------------------------------------------------------------------------

    def claim_stdout(self) -> None:
        """Sets the real stdout aside for the result; everything else that is printed is stderr's.

        It is never given back: C libraries flush their buffers, and child processes finish their
        lines, as late as at exit.
        """
        if self._result is not None:
            return
        if sys.stdout is not None:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
        try:
            # Not below 3: where stderr is closed too, that number is soon another's.
            self._result = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
        except OSError as error:
            raise LoftqError(
                "there is nowhere to write the result",
                cause=f"stdout is closed ({error.strerror})",
                hint="add >/dev/null if the result is not wanted",
            ) from None
        try:
            os.fstat(2)
        except OSError:  # closed: a file opened later must not become what libraries write to
            os.dup2(os.open(os.devnull, os.O_RDWR), 2)
            os.set_inheritable(2, True)
        os.dup2(2, 1)

    @property
    def has_claimed_stdout(self) -> bool:
        return self._result is not None

    @property
    def result_descriptor(self) -> int:
        return 1 if self._result is None else self._result

    @property
    def stdout_is_terminal(self) -> bool:
        return os.isatty(self.result_descriptor)

    @property
    def stdout_speaks_unicode(self) -> bool:
        """Whether box-drawing characters survive; files and pipes always get UTF-8."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        return not self.stdout_is_terminal or "utf" in encoding.lower()

    def write_result(self, text: str) -> None:
        """Writes the result. A reader that has seen enough (`| head -1`) is not an error."""
        encoding = "utf-8" if self.stdout_speaks_unicode else "ascii"
        data = memoryview(text.encode(encoding, errors="backslashreplace"))
        try:
            while data:
                data = data[os.write(self.result_descriptor, data) :]
        except BrokenPipeError:
            return
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            kind = DoesNotFit if full else LoftqError
            raise kind("could not write the result to stdout", cause=error.strerror) from None

    # --- stderr ---------------------------------------------------------------------------------

    @property
    def stderr_is_terminal(self) -> bool:
        return sys.stderr is not None and sys.stderr.isatty()

    def note(self, text: str) -> None:
        """Something nice to know."""
        if not self.quiet:
            self._say("note", text)

    def warn(self, text: str) -> None:
        """Something that the result's reader must know."""
        self._say("warning", text)

    def error(self, what: str, cause: str | None = None, hint: str | None = None) -> None:
        self._say("error", what)
        if cause:
            self._say("cause", cause)
        if hint:
            self._say("hint", hint)

    def trace(self) -> None:
        """The traceback of the exception being handled, with --debug."""
        if self.debug:
            import traceback

            self._write(traceback.format_exc())

    def _say(self, kind: str, text: str) -> None:
        label = f"{kind}:"
        if wants_colour(self.stderr_is_terminal):
            label = f"\x1b[{_STYLES[kind]}m{label}\x1b[0m"
        # A multi-line message keeps its lines; whatever else is not printable is spelled out.
        lines = [_shortened(visible(line)) for line in text.splitlines()] or [""]
        self._write(f"{label} " + "\n  ".join(lines) + "\n")

    def _write(self, text: str) -> None:
        # Losing the reader of stderr must not lose the work.
        with suppress(OSError, ValueError):
            if self._bar is not None:
                # The bar lives on the last line: it steps aside while something is said.
                self._bar.console.out(text.rstrip("\n"), highlight=False)
            elif sys.stderr is not None:
                sys.stderr.write(text)
                sys.stderr.flush()

    # --- progress -------------------------------------------------------------------------------

    @property
    def _is_watched(self) -> bool:
        terminal = self.stderr_is_terminal and os.environ.get("TERM") != "dumb"
        return terminal and not self.quiet

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Progress]:
        """Shows how far the work is: a bar on a terminal, a line now and then elsewhere."""
        if self._is_watched:
            with self._at_the_bottom(_rich_bar()) as bar:
                yield _BarProgress(label, total, bar)
        else:
            yield Progress() if self.quiet else _LineProgress(self, label, total)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Names, on a terminal, what takes long and cannot be measured; then takes it away."""
        if not self._is_watched:
            yield
            return
        from rich.text import Text

        with self._at_the_bottom(_rich_live()) as live:
            line = Text(f"{text} ...", style="dim", overflow="crop", no_wrap=True)
            live.update(line, refresh=True)
            yield

    @contextmanager
    def growing_text(self) -> Iterator[Callable[[str], None] | None]:
        """Shows text while it is being written, to whoever watches; None where nobody does.

        At the end it is taken away again: the result has all of it.
        """
        if not self._is_watched:
            yield None
            return
        with self._at_the_bottom(_rich_live()) as live:
            yield _GrowingText(live).add

    @contextmanager
    def _at_the_bottom(self, shown: _Shown) -> Iterator[_Shown]:
        """Shows it on the last lines, below what is said meanwhile."""
        with shown:
            self._bar = shown
            try:
                yield shown
            finally:
                self._bar = None


def _shortened(line: str) -> str:
    """The line; of one with a name of a megabyte in it, what can be read."""
    if len(line) <= _LONGEST_LINE:
        return line
    half = _LONGEST_LINE // 2
    return f"{line[:half]} … {line[-half:]}"


def _rich_live() -> Live:
    from rich.live import Live

    return Live(console=_rich_console(), transient=True, auto_refresh=False)


def _rich_bar() -> RichProgress:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.fields[label]}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[name]}", markup=False, style="dim"),
        console=_rich_console(),
        transient=True,
    )


def _rich_console() -> RichConsole:
    """Rich on stderr, told by us and not by the environment what the terminal can do."""
    from rich.console import Console as RichConsole

    return RichConsole(
        stderr=True,
        force_terminal=True,
        color_system="standard" if wants_colour(True) else None,
        width=width_of(2),
        highlight=False,
        _environ={},
    )


class _GrowingText:
    """The end of a text that grows, as much of it as the screen holds."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._text = ""
        self._shown = 0.0

    def add(self, text: str) -> None:
        self._text += text
        now = time.monotonic()
        if now - self._shown < LIVE_SECONDS:
            return
        self._shown = now
        from rich.text import Text

        width, height = self._live.console.size
        lines = [
            line[start : start + width]
            for line in map(visible, self._text.split("\n"))
            for start in range(0, max(len(line), 1), width)
        ]
        self._text = self._text[-width * height :]
        tail = Text("\n".join(lines[1 - height :]), style="dim", overflow="crop", no_wrap=True)
        self._live.update(tail, refresh=True)


class _BarProgress(Progress):
    def __init__(self, label: str, total: int, bar: RichProgress) -> None:
        self.label = label
        self.total = total
        self._bar = bar
        self._task = bar.add_task("", total=total, label=label, name="")

    def start(self, name: str) -> None:
        # The end of a layer's name tells layers apart; a bar that wraps is no bar.
        taken = len(self.label) + 2 * len(str(self.total)) + 36
        room = max(10, self._bar.console.width - taken)
        name = visible(name)
        self._bar.update(self._task, name=name if len(name) <= room else "…" + name[1 - room :])

    def advance(self, name: str = "") -> None:
        if name:
            self.start(name)
        self._bar.update(self._task, advance=1)


class _LineProgress(Progress):
    def __init__(self, console: Console, label: str, total: int) -> None:
        self.console = console
        self.label = label
        self.total = total
        self.done = 0
        self._began = self._spoke = time.monotonic()
        self._spoke_at = 0

    def advance(self, name: str = "") -> None:
        self.done += 1
        now = time.monotonic()
        share = (self.done - self._spoke_at) / max(self.total, 1)
        last = self.done == self.total
        if share < PLAIN_PROGRESS_SHARE and now - self._spoke < PLAIN_PROGRESS_SECONDS and not last:
            return
        self._spoke, self._spoke_at = now, self.done
        elapsed = now - self._began
        left = elapsed / self.done * (self.total - self.done)
        times = f"took {_clock(elapsed)}" if last else f"{_clock(left)} left"
        line = f"{self.label}: {self.done}/{self.total}, {times}"
        self.console._write(f"{line}, {visible(name)}\n" if name else f"{line}\n")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
