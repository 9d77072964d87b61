"""Pictures of a few characters, with Unicode and without."""

from __future__ import annotations

import json

import documents
import pytest

from loftq_cli.report.render import render
from loftq_cli.report.sparks import SPARKS_ASCII, bar, curve
from loftq_cli.schema import load_document


def test_a_curve_goes_from_its_highest_to_its_lowest() -> None:
    assert curve([4.0, 3.0, 2.0, 1.0]) == "█▆▃▁"
    assert curve([1.0, 1.0]) == "▁▁"
    assert curve([1.0]) == ""
    assert curve([]) == ""


def test_a_long_curve_keeps_its_ends() -> None:
    found = curve([float(value) for value in range(1000)])
    assert len(found) == 10
    assert (found[0], found[-1]) == ("▁", "█")
    assert list(found) == sorted(found)


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.0, ""), (1.0, "█" * 10), (0.5, "█" * 5), (0.0125, "▏"), (-0.3, ""), (7.0, "█" * 10)],
)
def test_a_bar_is_its_share_of_ten(share: float, shown: str) -> None:
    assert bar(share) == shown


def test_each_has_an_ascii_stand_in_that_keeps_the_order() -> None:
    table = str.maketrans(SPARKS_ASCII)
    assert curve([4.0, 3.0, 2.0, 1.0]).translate(table) == "#+:_"
    assert bar(0.5).translate(table) == "#####"
    assert all(len(each) == 1 and each.isascii() for each in SPARKS_ASCII.values())


def test_a_narrow_terminal_loses_the_picture_before_the_table() -> None:
    document = load_document(json.dumps(documents.ALL["targets"]))
    wide = render(document, "table", width=120)
    narrow = render(document, "table", width=72)
    assert "█" in wide
    assert "█" not in narrow
    assert "out × in" in narrow  # still a table


def test_pictures_are_for_terminals_only() -> None:
    document = load_document(json.dumps(documents.ALL["targets"]))
    for form in ("md", "tsv", "html"):
        assert "█" not in render(document, form)


def test_quantize_ends_with_the_best_and_the_worst_layers() -> None:
    data = documents.quantize()
    base = data["results"]["layers"][0]
    names = [f"h.{number}.up" for number in range(9)]
    data["results"]["layers"] = [
        {**base, "name": name, "weight_error_relative": 0.01 * (number + 1)}
        for number, name in enumerate(names)
    ]
    page = render(load_document(json.dumps(data)), "table", width=100)
    ending = page.partition("Least and most weight error of 9 layers")[2]
    assert [name for name in names if name in ending] == [*names[:3], *names[-3:]]
