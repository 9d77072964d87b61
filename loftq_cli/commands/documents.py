"""Finds result documents: in files, in directories, on stdin."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.schema import Document, NotAResultDocument, document_of

# Far above any result of ours; a file of this size is something else.
_MAX_BYTES = 256 << 20


@dataclass
class Found:
    """Documents with the file that each came from, and what was passed over, with the reason."""

    documents: list[tuple[str, Document[Any]]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    def add(self, file: str, documents: Iterable[Document[Any]]) -> None:
        """Takes each document once: a saved report has in it what may lie beside it."""
        for document in documents:
            content = document.model_dump_json()
            if content not in self._seen:
                self._seen.add(content)
                self.documents.append((file, document))


def find_documents(names: Sequence[str]) -> Found:
    """Every document in these files and directories; `-` is stdin.

    What is named has to hold documents; what merely lies in a directory is passed over if it
    holds none.

    Raises:
        NotAResultDocument: a named file holds something else, or nowhere was there a document.
        UsageError: a file is not there or cannot be read.
    """
    found = Found()
    for name in names:
        if name != "-" and _is_directory(name):
            _search(Path(name), found)
        else:
            found.add(name, _read(name))
    if not found.documents:
        raise NotAResultDocument(
            f"there is no result document in {', '.join(names)}",
            cause="; ".join(f"{file}: {reason}" for file, reason in found.skipped[:3])
            or "there are no files in it",
            hint="loftq check --save DIR writes one",
        )
    return found


def _is_directory(name: str) -> bool:
    try:
        return stat.S_ISDIR(Path(name).stat().st_mode)
    except OSError:
        return False  # whoever opens it says what is wrong


def _search(directory: Path, found: Found) -> None:
    """The documents that lie in the directory itself."""
    try:
        paths = sorted(directory.iterdir())
    except OSError as error:
        raise UsageError(f"cannot read {directory}", cause=error.strerror) from None
    for path in paths:
        if _is_summary(path):
            continue
        if path.suffix not in (".json", ".html") or not path.is_file():
            kind = "a directory" if path.is_dir() else "neither a .json nor a .html file"
            found.skipped.append((str(path), kind))
            continue
        try:
            found.add(str(path), list(_read(str(path))))
        except LoftqError as error:
            what = error.what.removeprefix(f"{path}: ")
            found.skipped.append((str(path), f"{what} ({error.cause})" if error.cause else what))


def _is_summary(path: Path) -> bool:
    """Whether this is the text that --save wrote beside a document."""
    stem = path.stem.removesuffix("_summary")
    return path.suffix == ".txt" and path.with_name(f"{stem}.json").is_file()


def _read(name: str) -> Iterator[Document[Any]]:
    """The documents of one file: one, several in a row, or an array of them."""
    piped = name == "-"
    place = "stdin" if piped else name
    try:
        with open(0 if piped else name, "rb", closefd=not piped) as opened:
            if stat.S_ISCHR(os.fstat(opened.fileno()).st_mode) and not opened.isatty():
                raise UsageError(f"{place} is a device", hint="name a file that --save wrote")
            raw = opened.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise UsageError(
                f"{place} is too large for a result document",
                cause=f"it has more than {_MAX_BYTES >> 20} MiB",
                hint="name a file that --save wrote",
            )
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {place}", cause=error.strerror) from None
    except UnicodeDecodeError as error:
        raise NotAResultDocument(
            f"{place}: this is not JSON", cause=f"it is not UTF-8 at byte {error.start}"
        ) from None
    if not text.strip():
        raise NotAResultDocument(
            f"{place} is empty",
            cause="the command before the pipe wrote no result" if piped else None,
        )
    try:
        yield from _documents(text)
    except NotAResultDocument as error:
        raise error.within(place) from None


def _documents(text: str) -> Iterator[Document[Any]]:
    if text.lstrip().startswith("<!doctype html>"):
        text = _embedded(text)
    decoder = json.JSONDecoder()
    position = 0
    while position < len(text):
        try:
            data, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            deep = isinstance(error, RecursionError)
            raise NotAResultDocument(
                "this is not JSON", cause="it is nested too deeply" if deep else str(error)
            ) from None
        for item in data if isinstance(data, list) else [data]:
            yield from _flat(document_of(item))
        while position < len(text) and text[position].isspace():
            position += 1


def _embedded(page: str) -> str:
    from loftq_cli.report.html.page import embedded

    found = embedded(page)
    if found is None:
        raise NotAResultDocument(
            "this page has no result document in it", hint="name a page that loftq report wrote"
        )
    return found


def _flat(document: Document[Any]) -> Iterator[Document[Any]]:
    """The document; of a report, the documents that it was made from."""
    if document.command != "report":
        yield document
        return
    for each in document.results.documents:
        yield from _flat(document_of(each.document))
