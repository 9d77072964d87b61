"""What was tried on this box: checks, loading, generating."""

from __future__ import annotations

from collections.abc import Iterator

from loftq_cli.report import units
from loftq_cli.report.html.figure import Figure, bars
from loftq_cli.schema import CheckResults, GenerateResults, LoadResults


def check_figures(results: CheckResults) -> Iterator[Figure]:
    tests = [test for test in results.tests if test.seconds > 0]
    slowest = sorted(tests, key=lambda test: -test.seconds)[:10]
    yield bars(
        "Time by check",
        [(test.name, test.seconds, units.seconds(test.seconds)) for test in slowest],
        ("check", "time"),
        f"The longest of {units.plural(len(results.tests), 'check')}.",
    )


def generate_figures(results: GenerateResults) -> Iterator[Figure]:
    rows = [
        (each.prompt, each.tokens_per_second, f"{units.significant(each.tokens_per_second)}/s")
        for each in results.generations
    ]
    yield bars("Tokens a second", rows, ("prompt", "tokens a second"), "By prompt, in turn.")


def load_figures(results: LoadResults) -> Iterator[Figure]:
    rows = [
        (name, float(count), units.size(count)) for name, count in results.bytes_by_dtype.items()
    ]
    yield bars("Bytes by dtype", rows, ("dtype", "bytes"), "Of the loaded model's parameters.")
