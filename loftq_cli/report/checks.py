"""What `check` and `verify` found: what their views share, findings, and what helps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loftq_cli.report import units
from loftq_cli.report.tables import Column, Facts, Records, Table, fields
from loftq_cli.schema import CheckResults, CheckTest, Document, VerifyResults

# Below this ratio two speeds are the same, on a box that does other things too.
FASTER = 1.2
_STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
_KERNELS = ("4-bit quantization", "int8 kernel")


def checks_table(title: str, tests: Sequence[CheckTest]) -> Table:
    columns = [
        Column("name", "check", "prose"),
        Column("status", "result", style=lambda value: _STYLES.get(value, "")),
        Column("seconds", "time", show=units.seconds),
        Column("detail", "what was found", "prose"),
    ]
    return Table(title, columns, tests)


def trouble(test: CheckTest, **more: str) -> Facts:
    """A check that failed, and what helps."""
    told = {"failed": test.name, "to verify": test.verified, **more}
    told |= {"cause": test.cause or "", "hint": test.hint or ""}
    return Facts([(label, text) for label, text in told.items() if text])


def check_records(tests: Sequence[CheckTest], *more: str) -> Records:
    """One line a check; its figures are in one column, as key=value."""
    keys = ["name", *more, "status", "seconds", "verified", "detail", "cause", "hint", "notes"]
    rows = [
        [*row, [f"{key}={value}" for key, value in test.figures.items()]]
        for row, test in zip(fields(tests, keys), tests, strict=True)
    ]
    return Records([*keys, "figures"], rows)


def figures(document: Document[CheckResults], name: str) -> Mapping[str, Any]:
    """The figures of a check that passed; none if it did not, or was not there."""
    tests = {test.name: test for test in document.results.tests}
    test = tests.get(name)
    return test.figures if test is not None and test.status == "passed" else {}


def _failures(document: Document[Any]) -> Iterator[str]:
    """What did not pass, of `check` and `verify` alike."""
    tests: list[CheckTest] = document.results.tests
    for test in tests:
        if test.status == "failed":
            more = "" if test.cause in (None, test.detail) else f": {test.cause}"
            yield f"{test.name} failed: {test.detail}{more}"
        for note in test.notes:
            yield f"{test.name}: {note}"
    skipped = [test for test in tests if test.status == "skipped"]
    if skipped:
        names = ", ".join(test.name for test in skipped)
        yield f"not checked: {names} ({skipped[0].cause})"


def hints(document: Document[Any]) -> Iterator[str]:
    """Those of what failed, of `check` and `verify` alike."""
    for test in document.results.tests:
        if test.status == "failed" and test.hint:
            yield f"for {test.name}: {test.hint}"


def verify_findings(document: Document[VerifyResults]) -> Iterator[str]:
    yield from _failures(document)
    differing = [layer.name for layer in document.results.layers if not layer.agrees]
    measured = document.results.measured_layers
    if differing:
        yield (
            f"{len(differing)} of {units.plural(measured, 'layer')} have another residual by the "
            f"files than by the report, the first is {differing[0]}"
        )
    elif measured:
        whole = document.results.quantized_layers
        share = "all" if measured == whole else f"{measured} of"
        yield f"the residuals of {share} {whole} layers, from the files, are those of the report"


def check_findings(document: Document[CheckResults]) -> Iterator[str]:
    yield from _failures(document)
    rates = figures(document, "matrix products")
    yield from _product_speeds(rates)
    layer = figures(document, "4-bit layer")
    training = layer.get("forward_error_relative_float32")
    inference = layer.get("inference_error_relative_float32")
    if training and inference and inference > 100 * training:
        yield (
            f"4-bit layers lose float32 in inference here: {units.percent(inference)} off the "
            f"exact product, where training is {training:.0e} off"
        )
    ties = sum(figures(document, name).get("ties_decided_otherwise", 0) for name in _KERNELS)
    if ties:
        yield (
            f"the kernels of this device decide {units.plural(ties, 'tie')} between two equally "
            "near levels otherwise than the reference; no value is affected that loftq writes"
        )
    text = figures(document, "generation")
    if text:
        alone, adapted = text["tokens_per_second"], text["tokens_per_second_with_adapter"]
        yield (
            f"an adapter of rank 8 that is not merged takes generation from "
            f"{units.significant(alone)} to {units.significant(adapted)} tokens/s"
            + (f" ({units.percent(1 - adapted / alone)} slower)" if adapted < alone else "")
        )
    trip = figures(document, "quantize")
    if trip:
        before, after = trip["quantized_only_error_relative"], trip["weight_error_relative"]
        yield (
            f"at rank {trip['rank']} and {trip['iterations']} iterations LoftQ takes away "
            f"{units.percent(1 - after / before)} of what NF4 loses here"
        )


def _product_speeds(rates: Mapping[str, Any]) -> Iterator[str]:
    whole = rates.get("flops_per_second_float32")
    if not whole:
        return
    for dtype in ("bfloat16", "float16"):
        ratio = rates.get(f"flops_per_second_{dtype}", whole) / whole
        if ratio > FASTER:
            yield f"{dtype} products are {units.significant(ratio)} times as fast as float32's here"
        elif ratio < 1 / FASTER:
            yield f"{dtype} products are {units.significant(1 / ratio)} times slower than float32's"
    alone, threads = rates.get("flops_per_second_float32_one_thread"), rates.get("threads", 1)
    if alone and threads > 1:
        if alone > FASTER * whole:
            yield (
                f"one thread multiplies {units.significant(alone / whole)} times as fast as "
                f"{threads} together: something else has the cores"
            )
        elif alone > whole:
            yield f"{threads} threads multiply no faster than one: something else has the cores"
        else:
            ratio = units.significant(whole / alone)
            yield f"{threads} threads multiply {ratio} times as fast as one"
