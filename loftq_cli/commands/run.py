"""The frame that every command body runs in.

    @command("load")
    def load(run: Run, model: str = "demo", device: str = "auto") -> None:
        ...
        run.finish(LoadResults(...), model=ModelIdentity(id=model, source="demo"))

`command` makes options of the parameters, adds those that all commands share (--format, --json,
--save, --html, --quiet, --debug), takes stdout aside before the body runs, and hands the body a
`Run`. Errors are simply raised: `loftq_cli.cli.main` turns them into messages and exit codes.
"""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import fields, is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Literal,
    NamedTuple,
    ParamSpec,
)

import typer

from loftq_cli.checkpoint.writer import TEMPORARY_SUFFIX, disk_errors, write_bytes_atomically
from loftq_cli.commands import spellings
from loftq_cli.console import Console, wants_colour, width_of
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.libraries import quiet_libraries
from loftq_cli.options import require_text
from loftq_cli.record import Record

if TYPE_CHECKING:
    from pydantic import BaseModel

    from loftq_cli.schema import Document, ModelIdentity

Body = ParamSpec("Body")


class Invocation(NamedTuple):
    """What `main` hands to a command through Typer's context."""

    argv: list[str]
    console: Console


class Run(Record):
    """One run of one command, from its options to its document."""

    def __init__(
        self,
        name: str,
        console: Console,
        argv: list[str],
        format: spellings.FormatName,
        save: Path | None,
        html: Path | None,
    ) -> None:
        super().__init__(name, argv, console)
        self.console = console
        self._format = format
        self._save = save
        self._html = html
        self.output: Path | None = None  # where the result goes instead of stdout

    def growing_text(self) -> AbstractContextManager[Callable[[str], None] | None]:
        """`with run.growing_text() as tell:`; `tell` is None where nobody watches."""
        return self.console.growing_text()

    def finish(self, results: BaseModel, *, model: ModelIdentity | None = None) -> None:
        """Builds the document, saves it if asked to, and prints it in the chosen format."""
        self.emit(self.document(results, model=model))

    def emit(self, document: Document[Any]) -> None:
        """Saves and prints a document that the body needed to have before (see `document`)."""
        # Saved first: a reader of stdout that hangs up must not cost the files. And where they
        # cannot be saved, stdout is all that is left of the work.
        try:
            if self._save is not None:
                self._write_files(self._save, document)
            if self._html is not None:
                self._write(self._html, "html", document)
        finally:
            self._print(document)

    def _write(self, file: Path, form: spellings.FormatName, document: Document[Any]) -> None:
        """The document in a file, in the form that its ending says where none was asked for."""
        from loftq_cli import schema
        from loftq_cli.report.render import render

        if form == "auto":
            form = _BY_ENDING.get(file.suffix, "tsv")
        text = schema.dump_json(document) if form == "json" else render(document, form)
        with disk_errors(file):
            write_bytes_atomically(file, text.encode())
        self.note(f"wrote {file}")

    def _print(self, document: Document[Any]) -> None:
        from loftq_cli import schema
        from loftq_cli.report.render import render

        chosen = self._format
        if self.output is not None:
            self._write(self.output, chosen, document)
            return
        if chosen == "auto":
            chosen = "table" if self.console.stdout_is_terminal else "tsv"
        if chosen == "json":
            self.console.write_result(schema.dump_json(document))
            return
        if chosen == "table":
            # Whoever reads a table here has had the warnings already, on stderr.
            document = document.model_copy(update={"warnings": []})
        out = self.console.result_descriptor
        self.console.write_result(
            render(
                document,
                chosen,
                width=width_of(out),
                colour=wants_colour(self.console.stdout_is_terminal),
                unicode=self.console.stdout_speaks_unicode,
            )
        )

    def _write_files(self, directory: Path, document: Document[Any]) -> None:
        from loftq_cli import schema
        from loftq_cli.report.render import render

        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        written: list[Path] = []
        try:
            with disk_errors(directory):
                directory.mkdir(parents=True, exist_ok=True)
            with (
                disk_errors(directory),
                _free_name(directory, f"loftq_{self.name}_{stamp}") as file,
            ):
                # The contract names the two files of `check`, where scripts look for them.
                ending = "_summary" if self.name == "check" else ""
                summary = file.with_name(f"{file.stem}{ending}.txt")
                for path, text in (
                    (summary, render(document, "table", width=100)),
                    (file, schema.dump_json(document)),
                ):
                    write_bytes_atomically(path, text.encode())
                    written.append(path)
        except LoftqError as error:
            for path in written:  # one without the other would look like all there is
                path.unlink(missing_ok=True)
            raise type(error)(
                f"could not save the result in {directory}",
                cause=error.cause,
                hint="it is on stdout all the same; --save another directory the next time",
            ) from None
        self.note(f"saved {file} and {summary.name}")


# What `auto` is for a file.
_BY_ENDING: dict[str, Literal["html", "json", "md", "table", "tsv"]] = {
    ".html": "html",
    ".json": "json",
    ".md": "md",
    ".txt": "table",
}


def prepare_file(file: Path, option: str) -> None:
    """Finds out before the work, not after it, that a result cannot be written there."""
    folder = file.parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(
            f"cannot write to {file}",
            cause=f"{file} is a directory"
            if file.is_dir()
            else f"{folder} is no directory that can be written",
            hint=f"{option} page.html",
        )


def prepare_save_directory(directory: Path) -> None:
    """Finds out before the work, not after it, that the result cannot be saved there."""
    if len(directory.parts) > 200:
        raise UsageError("the directory of --save lies too deep", hint="--save results")
    probe = directory / f".loftq_{os.getpid()}"
    # Taken away again: a run that fails leaves nothing.
    missing = [place for place in (directory, *directory.parents) if not os.path.lexists(place)]
    try:
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
    except LoftqError as error:
        raise type(error)(
            f"cannot save results in {directory}",
            cause=error.cause,
            hint="choose a directory that can be written with --save DIR",
        ) from None
    finally:
        for place in missing:
            with suppress(OSError):  # not there, or another run has put something into it
                place.rmdir()


@contextmanager
def _free_name(directory: Path, name: str) -> Iterator[Path]:
    """A JSON file that is not there yet, kept from other runs of this second meanwhile."""
    for attempt in itertools.count(1):
        file = directory / f"{name}{f'-{attempt}' if attempt > 1 else ''}.json"
        mark = file.with_name(f".{file.name}{TEMPORARY_SUFFIX}")
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            if not file.exists():
                yield file
                return
        finally:
            mark.unlink(missing_ok=True)


def _require_working_directory() -> None:
    """Refuses to work where no path leads from: libraries below torch end the process there."""
    try:
        Path.cwd()
    except OSError as error:
        raise LoftqError(
            "the working directory cannot be used",
            cause=error.strerror,
            hint="cd to a directory that is there",
        ) from None


def _require_texts(context: typer.Context, argv: list[str]) -> None:
    """Refuses options that have no value, or one that no result could tell."""
    # As it was typed: Path("") is the working directory.
    for before, word in itertools.pairwise(argv):
        name, equals, value = word.partition("=")
        if "--prompt" in (before, name) or before == "-p":
            continue  # any text is a prompt, an empty one too
        if not word:
            require_text(before if before.startswith("-") else "an argument", word)
        if name.startswith("--") and equals:
            require_text(name, value)
    for parameter in context.command.params:
        given = context.params.get(parameter.name or "")
        for text in given if isinstance(given, list | tuple) else [given]:
            if isinstance(text, str | Path) and str(text):
                require_text(max(parameter.opts, key=len), str(text))


_SHARED = {
    "format": "auto",
    "json": False,
    "save": None,
    "html": None,
    "quiet": False,
    "debug": False,
}


def command(
    name: str, **own: Any
) -> Callable[[Callable[Concatenate[Run, Body], None]], Callable[..., None]]:
    """Makes a body into the function that Typer calls: options in, a `Run` handed on.

    A parameter is the option of its name in the table, unless ``own`` has another of that name, or
    None for a shared one that the command does not have. One whose annotation is a class of options
    (`options.py`) stands for all of them.
    """

    def wrap(body: Callable[Concatenate[Run, Body], None]) -> Callable[..., None]:
        table = {**spellings.OPTIONS, **own}
        _, *taken = inspect.signature(body, eval_str=True).parameters.values()
        groups: dict[str, Any] = {
            each.name: each.annotation for each in taken if is_dataclass(each.annotation)
        }

        def framed(context: typer.Context, **arguments: Any) -> None:
            invocation: Invocation = context.obj
            _require_texts(context, invocation.argv)
            _require_working_directory()
            shared = {key: arguments.pop(key, None) for key in _SHARED}
            console = invocation.console
            console.quiet = shared["quiet"]
            console.debug = console.debug or shared["debug"]
            if shared["json"] and shared["format"] not in ("auto", "json"):
                raise UsageError(f"--json contradicts --format {shared['format']}")
            console.claim_stdout()
            if not console.debug:
                quiet_libraries()
            if shared["save"] is not None:
                prepare_save_directory(shared["save"])
            if shared["html"] is not None:
                prepare_file(shared["html"], "--html")
            run = Run(
                name,
                console,
                argv=["loftq", *invocation.argv],
                format="json" if shared["json"] else shared["format"],
                save=shared["save"],
                html=shared["html"],
            )
            for key, group in groups.items():
                names = [field.name for field in fields(group)]
                arguments[key] = group(**{each: arguments.pop(each) for each in names})
            body(run, **arguments)  # type: ignore[call-arg]

        def parameter(key: str, annotation: Any, default: Any) -> inspect.Parameter:
            kind = inspect.Parameter.KEYWORD_ONLY
            return inspect.Parameter(key, kind, annotation=annotation, default=default)

        parameters = [parameter("context", typer.Context, inspect.Parameter.empty)]
        for each in taken:
            if each.name in groups:
                found = fields(groups[each.name])
                parameters += [parameter(f.name, table[f.name], f.default) for f in found]
            else:
                parameters.append(parameter(each.name, table[each.name], each.default))
        parameters += [
            parameter(key, table[key], default)
            for key, default in _SHARED.items()
            if table[key] is not None
        ]
        framed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        framed.__annotations__ = {each.name: each.annotation for each in parameters}
        framed.__name__ = body.__name__
        framed.__doc__ = body.__doc__
        return framed

    return wrap
