"""Results as pages for a browser: whole, inert, and given back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import documents
import pytest

from loftq_cli.report.html import svg
from loftq_cli.report.html.figures import figures_of
from loftq_cli.report.html.page import embedded
from loftq_cli.report.html.svg import Axis, Series
from loftq_cli.report.render import render
from loftq_cli.schema import Document, load_document
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]
_VOID = {"meta", "br", "hr", "img", "input", "link"}


class Tags(HTMLParser):
    """The elements of a page, and whether every one of them is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("script", "style"):
            self.texts.append(data)


@pytest.fixture(params=documents.ALL)
def document(request: pytest.FixtureRequest) -> Document[Any]:
    return load_document(json.dumps(documents.ALL[request.param]))


def test_a_page_is_whole_and_fetches_nothing(document: Document[Any]) -> None:
    page = render(document, "html")
    tags = Tags(page)
    assert len(page) < 500_000
    names = [tag for tag, _ in tags.found]
    # What could fetch or run something, whatever a name in the document tries.
    assert not {"link", "img", "iframe", "object", "embed", "base", "form", "image"} & {*names}
    scripts = [attributes for tag, attributes in tags.found if tag == "script"]
    assert [each["type"] for each in scripts] == ["application/json"]
    for tag, attributes in tags.found:
        assert not any(name.startswith("on") or name in ("src", "style") for name in attributes), (
            tag
        )
        assert (attributes.get("href") or "#").startswith("#")
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    policies = [a["content"] for _, a in tags.found if a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_document_comes_back_exactly(document: Document[Any]) -> None:
    found = embedded(render(document, "html"))
    assert found is not None
    assert load_document(found) == document


def test_hostile_names_stay_text() -> None:
    data = documents.quantize()
    name = "h.0.</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;"
    data["results"]["layers"][0]["name"] = name
    data["model"]["id"] = '"><svg onload=alert(1)>'
    document = load_document(json.dumps(data))
    page = render(document, "html")
    tags = Tags(page)
    assert "img" not in [tag for tag, _ in tags.found]
    assert not any("onload" in attributes for _, attributes in tags.found)
    assert len(re.findall("<script", page)) == 1
    assert any("<script>alert(1)</script>" in text for text in tags.texts)
    found = embedded(page)
    assert found is not None
    assert load_document(found) == document


def test_pictures_are_drawn_and_named(document: Document[Any]) -> None:
    figures = figures_of(document)
    drawn = {"quantize", "sweep-ranks", "targets", "compare", "check", "generate", "load"}
    requantized = getattr(document.results, "requantized", None) is not None
    assert bool(figures) == (document.command in drawn or requantized)
    page = render(document, "html")
    for figure in figures:
        root = ElementTree.fromstring(figure.picture)
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"]
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for element in root.iter():
            for key, most in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                assert 0 <= float(element.get(key, 0)) <= most + 0.1, (figure.title, element.attrib)
        assert figure.picture in page
        assert figure.table.items


def test_a_cell_for_every_layer_and_a_bar_for_every_value() -> None:
    values = {("up", "0"): 0.1, ("up", "1"): 0.3, ("down", "0"): 0.2}
    found = svg.heat("errors", ["up", "down"], ["0", "1"], values, str)
    root = ElementTree.fromstring(found)
    cells = {title.text: float(cell.attrib["fill-opacity"]) for cell in root for title in cell}
    cells.pop(None, None)
    assert cells["up, 0: 0.1"] < cells["down, 0: 0.2"] < cells["up, 1: 0.3"]
    bars = ElementTree.fromstring(svg.bars("b", [("a", 1.0, "1"), ("b", 4.0, "4")], "b"))
    widths = [float(each.attrib["width"]) for each in bars.iter("rect")]
    assert widths[1] == pytest.approx(4 * widths[0], rel=0.01)


def test_a_line_goes_through_its_points() -> None:
    points = [(1.0, 0.001), (10.0, 0.01), (100.0, 0.1)]
    found = svg.lines(
        "l", [Series("s", points)], Axis("x", str, log=True), Axis("y", str, log=True)
    )
    (line,) = ElementTree.fromstring(found).iter("polyline")
    places = [tuple(map(float, each.split(","))) for each in line.attrib["points"].split()]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # decades are as wide as each other
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y1 > y2  # and more is higher up


def test_report_writes_a_page_and_reads_it_again(loftq: Loftq, tmp_path: Path) -> None:
    for name in ("quantize", "sweep-ranks"):
        (tmp_path / f"{name}.json").write_text(json.dumps(documents.ALL[name]))
    page = tmp_path / "page.html"
    done = loftq("report", tmp_path, "--format", "html", "-o", page)
    assert (done.code, done.out) == (0, "")
    written = page.read_text()
    assert "<!doctype html>" in written
    again = json.loads(loftq("report", page, "--format", "json").out)
    found = [each["document"] for each in again["results"]["documents"]]
    wanted = [
        load_document(json.dumps(documents.ALL[name])).model_dump(mode="json", by_alias=True)
        for name in ("quantize", "sweep-ranks")
    ]
    assert found == wanted
    assert loftq("report", page, "--format", "html").out.startswith("<!doctype html>")


def test_the_ending_of_the_file_says_the_form(loftq: Loftq, tmp_path: Path) -> None:
    source = tmp_path / "load.json"
    source.write_text(json.dumps(documents.ALL["load"]))
    for name, begins in (("a.html", "<!doctype html>"), ("a.md", "## "), ("a.json", "{\n")):
        assert loftq("report", source, "-o", tmp_path / name).code == 0
        assert (tmp_path / name).read_text().startswith(begins)
    assert loftq("report", source, "-o", tmp_path / "a.txt").code == 0
    assert (tmp_path / "a.txt").read_text().startswith("Report on 1 result document\n")


def test_any_command_writes_its_page(loftq: Loftq, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = loftq("targets", "--html", page, "--json")
    assert done.code == 0, done.err
    found = embedded(page.read_text())
    assert found is not None
    assert json.loads(found) == json.loads(done.out)


@pytest.mark.parametrize("place", [".", "missing/page.html"])
def test_a_page_that_cannot_be_written_is_a_mistake_before_the_work(
    loftq: Loftq, tmp_path: Path, place: str
) -> None:
    done = loftq("targets", "--html", tmp_path / place)
    assert (done.code, done.out) == (2, "")
    assert "cannot write to" in done.err


def test_a_page_of_others_is_no_document(loftq: Loftq, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><title>another</title>")
    done = loftq("report", page)
    assert done.code == 1
    assert "no result document" in done.err
