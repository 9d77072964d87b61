"""Every document in every form at once."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import documents
import pytest

from loftq_cli.console import wants_colour, width_of
from loftq_cli.report import units
from loftq_cli.report.render import VIEWS, render, view_of
from loftq_cli.schema import RESULTS, Document, dump_json, load_document

SGR = re.compile(r"\x1b\[[0-9;]*m")
EVIL_SHOWN = documents.EVIL.removeprefix("h.0.").encode("unicode_escape").decode()


@pytest.fixture(params=documents.ALL)
def data(request: pytest.FixtureRequest) -> dict[str, Any]:
    return documents.ALL[request.param]


@pytest.fixture
def document(data: dict[str, Any]) -> Document[Any]:
    return load_document(json.dumps(data))


def squeezed(page: str) -> str:
    """The page without what folding adds."""
    return "".join(page.split())


def test_every_document_has_a_view_and_a_sample() -> None:
    assert set(VIEWS) == set(RESULTS)
    assert {data["schema"].removeprefix("loftq/") for data in documents.ALL.values()} == set(VIEWS)


def test_json(document: Document[Any], data: dict[str, Any]) -> None:
    text = dump_json(document)
    assert text.endswith("}\n")
    again = json.loads(text)
    assert list(again) == [
        "schema",
        "schema_version",
        "tool",
        "argv",
        "model",
        "resolved",
        "environment",
        "results",
        "warnings",
        "timings_seconds",
    ]
    assert load_document(text) == document
    assert all(line.isprintable() for line in text.split("\n"))


def test_tsv(document: Document[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    page = render(document, "tsv", width=40, colour=True)
    header, *records = page.rstrip("\n").split("\n")
    width = len(header.split("\t"))
    assert records
    assert all(len(record.split("\t")) == width for record in records)
    assert all(cell.isprintable() for record in records for cell in record.split("\t"))
    assert "…" not in page


def test_markdown(document: Document[Any]) -> None:
    page = render(document, "md")
    assert page.startswith("## ")
    assert r"> **Warning:** beware of \[bold\]this\[/\]" in page
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", page, flags=re.DOTALL | re.MULTILINE)
    assert "```" not in outside, "a fence that text from outside could close"
    for table in re.findall(r"(?:^\|.*\n?)+", outside, flags=re.MULTILINE):
        bars = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(bars) == 1, table
    assert all(line.isprintable() for line in page.split("\n"))


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("unicode", [True, False])
def test_table(document: Document[Any], width: int, unicode: bool) -> None:
    page = render(document, "table", width=width, unicode=unicode)
    assert page == render(document, "table", width=width, unicode=unicode, colour=False)
    assert all(line.isprintable() for line in page.split("\n")), "no escape code, no control"
    assert all(line == line.rstrip() for line in page.split("\n"))
    shown, _, rest = page.partition("Load it\n")
    code = rest.partition("\n\n")[0]
    if document.command != "generate":  # whose lines are the model's
        assert all(len(line) <= width for line in shown.split("\n"))
    assert all(line.startswith("    ") for line in code.splitlines()), "code is never wrapped"
    assert "warning: bewareof[bold]this[/]" in squeezed(page).replace("warning:", "warning: ")
    if not unicode:
        assert page.isascii()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_colour_changes_nothing_but_colour(document: Document[Any], width: int) -> None:
    plain = render(document, "table", width=width)
    coloured = render(document, "table", width=width, colour=True)
    assert SGR.search(coloured)
    assert squeezed(SGR.sub("", coloured)) == squeezed(plain)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_longest_and_wildest_name_comes_through_whole(width: int) -> None:
    document = load_document(json.dumps(documents.quantize()))
    lines = render(document, "table", width=width).splitlines()
    if width >= 80:  # a table, whose first column holds the name
        header = next(line for line in lines if line.startswith("layer "))
        lines = [line[: header.index("count")] for line in lines]
    assert EVIL_SHOWN in squeezed("".join(lines))
    records = render(document, "tsv").splitlines()
    assert any(record.startswith("h.0." + EVIL_SHOWN + "\t") for record in records)
    assert EVIL_SHOWN.replace("|", r"\|") in render(document, "md")


def test_tsv_of_quantize_names_every_tensor_with_raw_values() -> None:
    data = documents.quantize()
    page = render(load_document(json.dumps(data)), "tsv")
    rows = list(csv.DictReader(page.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    by_treatment = {row["treatment"]: row for row in rows}
    assert len(rows) == 37 + 1 + 1
    assert by_treatment["adapted"]["weight_error_relative"] == "0.0702"
    assert by_treatment["adapted"]["shape"] == "768,768"
    assert by_treatment["quantized"]["reason"] == "not among --target-modules"
    assert by_treatment["untouched"]["bytes"] == "154389504"
    assert by_treatment["untouched"]["rank"] == ""


def test_quantize_for_a_person() -> None:
    page = render(load_document(json.dumps(documents.quantize())), "table", width=100)
    assert page.startswith("Wrote gpt2-loftq: gpt2 in NF4 with a rank-16 adapter\n")
    for line in (
        "  backbone      548 MB → 131 MB (23.9 % of it)",
        "  adapter       9.44 MB, 2,359,296 trainable parameters",
        "  weight error  9.36 % → 7.02 % with the adapter (25.0 % of it removed)",
        "  time          41.2 s",
        "  peak memory   812 MB",
        '    model = AutoModelForCausalLM.from_pretrained("gpt2-loftq")',
    ):
        assert line in page.splitlines()
    # One row a kind of layer; two layers called c_proj differ in shape, so they are two kinds.
    kinds = [line.split()[:5] for line in page.splitlines() if "  25.0 %" in line and "×" in line]
    assert kinds[0] == ["c_attn", "12", "2304", "×", "768"]
    assert kinds[1] == ["attn.c_proj", "12", "768", "×", "768"]
    assert kinds[2] == ["mlp.c_proj", "12", "768", "×", "3072"]


def test_a_dry_run_claims_nothing_measured() -> None:
    page = render(load_document(json.dumps(documents.quantize(dry_run=True))), "table", width=100)
    assert page.startswith("Dry run: gpt2 in NF4")
    assert "about 131 MB" in page
    for word in ("error", "removed", "Load it", "Wrote"):
        assert word not in page


def test_generate_shows_text_line_by_line() -> None:
    page = render(load_document(json.dumps(documents.generate())), "table", width=40)
    lines = page.splitlines()
    start = lines.index("› def main")
    assert lines[start + 1 : start + 4] == ["():", r"\tprint('[red]hi[/]')", "```\\x1b[2J"]
    assert lines[start + 4] == "12 tokens in 500 ms, 24.0 tokens/s"


def test_load_gives_the_reason_for_every_choice() -> None:
    page = render(load_document(json.dumps(documents.load())), "table", width=100)
    assert "  device        cpu (auto: no GPU)" in page
    assert "  quantization  nf4, 48 quantized layers" in page
    assert "124,439,808 in 248 MB bfloat16, 880 kB uint8" in page


def test_a_view_is_found_by_the_name_of_the_schema(document: Document[Any]) -> None:
    assert view_of(document).warnings == ["beware of [bold]this[/]"]


@pytest.mark.parametrize(
    ("environ", "on_terminal", "elsewhere"),
    [
        ({}, True, False),
        ({"TERM": "xterm-256color"}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_when_colour_is_wanted(environ: dict[str, str], on_terminal: bool, elsewhere: bool) -> None:
    assert wants_colour(True, environ) is on_terminal
    assert wants_colour(False, environ) is elsewhere


def test_width() -> None:
    with Path(os.devnull).open() as nowhere:
        assert width_of(nowhere.fileno(), {"COLUMNS": "133"}) == 133
        assert width_of(nowhere.fileno(), {"COLUMNS": "0"}) == 80
        assert width_of(nowhere.fileno(), {"COLUMNS": "wide"}) == 80
        assert width_of(nowhere.fileno(), {}) == 80


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.size(0), "0 B"),
        (units.size(999), "999 B"),
        (units.size(1234567), "1.23 MB"),
        (units.size(999_600), "1.00 MB"),
        (units.size(141_107_412_992), "141 GB"),
        (units.size(5 * 10**15), "5000 TB"),
        (units.percent(0.0702), "7.02 %"),
        (units.percent(0.00325), "0.325 %"),
        (units.percent(1), "100 %"),
        (units.percent(-0.05), "-5.00 %"),
        (units.percent(0), "0 %"),
        (units.seconds(0.0123), "12.3 ms"),
        (units.seconds(41.24), "41.2 s"),
        (units.seconds(754), "12 min 34 s"),
        (units.seconds(7260), "2 h 1 min"),
        (units.shape((768, 2304)), "768 × 2304"),
        (units.shape(()), "1"),
        (units.plural(1, "layer"), "1 layer"),
        (units.plural(1200, "layer"), "1,200 layers"),
    ],
)
def test_units(shown: str, expected: str) -> None:
    assert shown == expected
