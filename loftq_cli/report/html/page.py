"""One self-contained page: verdicts on top, every document with its pictures and tables, and the
documents themselves, so that the page can be given back to `loftq report`.

Nothing in it is fetched and nothing runs; its own policy forbids both. Whatever a name in a
document contains stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from loftq_cli.report.html.figure import Figure
from loftq_cli.report.html.figures import figures_of
from loftq_cli.report.html.svg import text
from loftq_cli.report.tables import (
    Code,
    Column,
    Facts,
    Heading,
    Passage,
    Section,
    Sentences,
    Table,
    View,
)
from loftq_cli.schema import Document, ReportResults, document_of

_DATA = '<script type="application/json" id="loftq-document">'
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# Rows of a table that are shown before one asks for more.
_SHOWN_ROWS = 40


def page(document: Document[Any], view_of: Callable[[Document[Any]], View]) -> str:
    """The page of a document; of a report, that of all the documents in it."""
    inner = _documents(document)
    view = view_of(document)
    views = [view_of(each) for each in inner]
    body = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{text(view.title)}</title>",
        f"<style>{_style()}</style></head><body>",
        f"<header><h1>{text(view.title)}</h1>",
        f"<p><code>{text(' '.join(document.argv))}</code></p></header>",
        _verdicts(inner, views),
        "<main>",
    ]
    for number, (each, shown) in enumerate(zip(inner, views, strict=True)):
        body += _document(number, each, shown)
    if document.command == "report":
        body.append('<section id="more">')
        body += [_section(each) for each in _beside(view, views)]
        body.append("</section>")
    body += ["</main>", f"{_DATA}{_data(document)}</script>", "</body></html>", ""]
    return "\n".join(body)


def embedded(page: str) -> str | None:
    """The JSON of the document that a page was made of; None if it is no such page."""
    found = re.search(f"{re.escape(_DATA)}(.*?)</script>", page, re.DOTALL)
    return None if found is None else found[1]


def _documents(document: Document[Any]) -> list[Document[Any]]:
    if document.command != "report":
        return [document]
    results: ReportResults = document.results
    return [document_of(each.document) for each in results.documents]


def _data(document: Document[Any]) -> str:
    """As JSON in which no tag can begin or end."""
    data = json.dumps(document.model_dump(mode="json", by_alias=True), allow_nan=False)
    return data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _style() -> str:
    return files(__package__).joinpath("style.css").read_text(encoding="utf-8")


def _verdicts(documents: Sequence[Document[Any]], views: Sequence[View]) -> str:
    items = []
    for number, (document, view) in enumerate(zip(documents, views, strict=True)):
        verdict = getattr(document.results, "verdict", None)
        said = view.title if verdict is None else verdict.sentence
        items.append(f'<li><a href="#d{number}">{text(document.command)}</a> {text(said)}</li>')
    return f'<nav aria-label="Verdicts"><ul>{"".join(items)}</ul></nav>'


def _document(number: int, document: Document[Any], view: View) -> Iterator[str]:
    yield f'<section id="d{number}"><h2>{text(view.title)}</h2>'
    for warning in view.warnings:
        yield f'<p class="warning">{text(warning)}</p>'
    figures = figures_of(document)
    if figures:
        yield '<div class="figures">'
        yield from map(_figure, figures)
        yield "</div>"
    yield from map(_section, view.sections)
    yield "</section>"


def _figure(figure: Figure) -> str:
    return (
        f"<figure><figcaption><b>{text(figure.title)}</b> {text(figure.note)}</figcaption>"
        f"{figure.picture}<details><summary>The numbers</summary>{_table(figure.table)}</details>"
        "</figure>"
    )


def _beside(view: View, views: Sequence[View]) -> list[Section]:
    """Of a report's sections, those that are not a document's own: systems, findings, advice."""
    titles, kept, inside = {each.title for each in views}, [], False
    for section in view.sections:
        if isinstance(section, Heading):
            inside = section.title in titles
        if not inside:
            kept.append(section)
    return kept


def _section(section: Section) -> str:
    match section:
        case Facts(items):
            rows = (f"<dt>{text(label)}</dt><dd>{text(value)}</dd>" for label, value in items)
            return f"<dl>{''.join(rows)}</dl>"
        case Table(title):
            return f"<h3>{text(title)}</h3>{_long(section)}"
        case Heading(title):
            return f"<h2>{text(title)}</h2>"
        case Sentences(title, items):
            points = "".join(f"<li>{text(item)}</li>" for item in items)
            return f"<h3>{text(title)}</h3><ul>{points}</ul>"
        case Passage(title, body, caption):
            lines = "\n".join(map(text, body.splitlines()))
            return f"<h3>{text(title)}</h3><pre>{lines}</pre><p>{text(caption)}</p>"
        case Code(title, lines):
            code = "\n".join(map(escape, lines))
            return f"<h3>{text(title)}</h3><pre><code>{code}</code></pre>"


def _long(table: Table) -> str:
    """A table; a very long one is folded up."""
    table = table.in_words()
    if len(table.items) <= _SHOWN_ROWS:
        return _table(table)
    return f"<details><summary>{len(table.items)} rows</summary>{_table(table)}</details>"


def _table(table: Table) -> str:
    head = "".join(_cell("th", column, text(column.title)) for column in table.columns)
    rows = (
        "".join(_cell("td", column, text(column.cell(item))) for column in table.columns)
        for item in table.items
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(table.title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(tag: str, column: Column, content: str) -> str:
    scope = ' scope="col"' if tag == "th" else ""
    return f'<{tag}{scope} class="{column.kind}">{content}</{tag}>'
