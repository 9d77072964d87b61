"""One sentence about a document, and the figures that it may stand on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loftq_cli.schema import CheckResults, Document, Remark


def remark(document: Document[Any], text: str) -> Remark:
    model = None if document.model is None else document.model.id
    return Remark(command=document.command, model=model, text=text)


def figures(document: Document[CheckResults], name: str) -> Mapping[str, Any]:
    """The figures of a check that passed; none if it did not, or was not there."""
    tests = {test.name: test for test in document.results.tests}
    test = tests.get(name)
    return test.figures if test is not None and test.status == "passed" else {}
