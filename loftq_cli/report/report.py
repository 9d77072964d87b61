"""A report on several documents: systems, results by command, findings, recommendations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from loftq_cli.report import units
from loftq_cli.report.tables import Facts, Heading, Records, Section, Sentences, View
from loftq_cli.schema import RESULTS, Document, Environment, Remark, ReportResults, document_of


def report_view(
    document: Document[ReportResults], view_of: Callable[[Document[Any]], View]
) -> View:
    results = document.results
    read = [(each.file, document_of(each.document)) for each in results.documents]
    read.sort(key=lambda each: list(RESULTS).index(each[1].command))
    views = [(file, view_of(each)) for file, each in read]
    sections: list[Section] = []
    for system in results.systems:
        sections.append(Heading("System"))
        sections.append(_system(system))
    for _, view in views:
        sections.append(Heading(view.title))
        sections.extend(view.sections)
        if view.warnings:
            sections.append(Sentences("Warnings", view.warnings))
    for kind, remarks in _remarks(results):
        if remarks:
            sections += [Heading(f"{kind.capitalize()}s"), *_by_command(remarks)]
    if results.skipped:
        sections.append(Heading("Skipped"))
        sections.append(Facts([(each.file, each.reason) for each in results.skipped]))
    count = units.plural(len(results.documents), "result document")
    return View(f"Report on {count}", sections, _records(results, views))


def _system(system: Environment) -> Facts:
    memory = "" if system.memory_bytes is None else f", {units.size(system.memory_bytes)} of memory"
    facts = [
        ("platform", system.platform),
        ("processor", f"{units.plural(system.cpu_count, 'core')} ({system.machine}){memory}"),
    ]
    facts += [
        ("accelerator", f"{each.name}, {units.size(each.memory_bytes)}")
        for each in system.accelerators
    ]
    packages = ", ".join(f"{name} {version}" for name, version in system.packages.items())
    facts += [("python", system.python), ("packages", packages)]
    return Facts(facts)


def _remarks(results: ReportResults) -> list[tuple[str, Sequence[Remark]]]:
    return [("finding", results.findings), ("recommendation", results.recommendations)]


def _by_command(remarks: Sequence[Remark]) -> list[Section]:
    groups: dict[tuple[str, str | None], list[str]] = {}
    for each in remarks:
        groups.setdefault((each.command, each.model), []).append(each.text)
    return [
        Sentences(command if model is None else f"{command}, {model}", texts)
        for (command, model), texts in groups.items()
    ]


def _records(results: ReportResults, views: Sequence[tuple[str, View]]) -> Records:
    """One line for each thing that is said."""
    rows: list[list[Any]] = [["result", file, None, None, view.title] for file, view in views]
    for kind, remarks in _remarks(results):
        rows += [[kind, None, each.command, each.model, each.text] for each in remarks]
    rows += [["skipped", each.file, None, None, each.reason] for each in results.skipped]
    return Records(("kind", "file", "command", "model", "text"), rows)
