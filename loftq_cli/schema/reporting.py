"""Results of `report`: what other documents say together."""

from __future__ import annotations

from typing import Any

from loftq_cli.schema.envelope import Environment, Model


class ReportedDocument(Model):
    """One document that was read, whole; `file` is `-` for stdin."""

    file: str
    document: dict[str, Any]


class Remark(Model):
    """One sentence that the numbers of a document, or of several, led to."""

    command: str
    model: str | None
    text: str


class SkippedFile(Model):
    file: str
    reason: str


class ReportResults(Model):
    systems: list[Environment]  # each once
    documents: list[ReportedDocument]
    findings: list[Remark]
    recommendations: list[Remark]
    skipped: list[SkippedFile] = []
