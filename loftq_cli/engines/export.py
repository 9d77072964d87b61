"""The whole `export` run: the codes and scales of one directory in the other container of integers.

Of a weight file all tensors are written, with the parts of a quantized weight replaced by those of
the other container; index, configs, report and README made anew; the rest copied. Each weight is
held against the codes and scales that its container may have.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli import __version__, schema
from loftq_cli.checkpoint.index import load_json
from loftq_cli.checkpoint.staging import Staging
from loftq_cli.containers.base import Weight
from loftq_cli.engines import output
from loftq_cli.engines.export_plan import ExportPlan, plan_export
from loftq_cli.engines.report_file import Report, read_report, refuse_output, write_report
from loftq_cli.engines.rewriting import write_files
from loftq_cli.engines.written import ADAPTER_CONFIG_NAME, WeightFile
from loftq_cli.errors import LoftqError
from loftq_cli.models.source import CONFIG_FILE, main_dtype
from loftq_cli.record import Record

if TYPE_CHECKING:
    from loftq_cli.schema import Document, ExportResults


def export_directory(
    record: Record,
    source: Path,
    container: str,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Document[ExportResults]:
    """Writes the directory ``source`` in another ``container``, or finishes what is left of that.

    Args:
        resume: an ``out`` that is complete will do.
        force: an ``out`` that is there is replaced.

    Raises:
        LoftqError: as `plan_export`, and whatever is wrong with a file or the disk.
    """
    began = time.perf_counter()
    refuse_output(out, force=force, resume=resume)
    with record.timing("plan"):
        plan = plan_export(source, container, trust_remote_code=trust_remote_code)
    report = _complete(plan, out) if resume else None
    if report is not None:
        record.note(f"{out} is already complete")
    else:
        report = write_export(plan, out, record, force=force)
    results = schema.ExportResults(
        source=str(source),
        output=str(out),
        source_container=plan.before.name,
        container=plan.after.name,
        quantized_layers=len(plan.written.weights),
        files=report.results.files,
        input_bytes=plan.written.bytes(plan.before.planned),
        output_bytes=plan.written.bytes(plan.after.planned),
        source_stored_bits=plan.stored_bits(plan.before),
        stored_bits=plan.stored_bits(plan.after),
        seconds=time.perf_counter() - began,
    )
    return record.document(results, model=plan.written.report.model)


def write_export(plan: ExportPlan, out: Path, record: Record, *, force: bool) -> Report:
    """Writes what is planned, but for files that an interrupted run has finished.

    Returns:
        the report of the output.
    """
    written = plan.written
    hashes = {name: each.sha256 for name, each in written.listed.items()}
    fingerprint = {"loftq": __version__, "files": hashes, "container": plan.after.name}
    with Staging(out, fingerprint=fingerprint, force=force, protected=[written.source]) as staging:
        write_files(
            written,
            staging,
            record,
            doing="exporting",
            form=plan.after.planned,
            convert=partial(_converted, plan),
            copied=plan.copied,
        )
        _write_descriptions(plan, out, staging)
        files = [
            schema.WrittenFile(name=each.name, bytes=each.bytes, sha256=each.sha256)
            for each in output.written_files(staging)
        ]
        report = plan.exported_report(out)
        results = report.results.model_copy(update={"files": files})
        report = write_report(staging, report.model_copy(update={"results": results}))
        staging.commit()
    return report


def _complete(plan: ExportPlan, out: Path) -> Report | None:
    """The report of an output that this very plan gave; None if there is no such.

    It says the same as the one to be written, but for hashes and for where the output was then.
    """

    def without_place(report: Report) -> Report:
        changed = {"files": [], "output": ""}
        return report.model_copy(update={"results": report.results.model_copy(update=changed)})

    try:
        found = read_report(out)
    except LoftqError:
        return None
    same = without_place(found) == without_place(plan.exported_report(out))
    return found if same else None


def _converted(
    plan: ExportPlan, file: WeightFile, weight: Weight
) -> Iterator[tuple[str, memoryview]]:
    """The names and bytes of what a weight is in the other container."""
    stored = plan.written.stored(file, weight)
    yield from plan.after.tensors(weight.name, plan.before.quantized(stored))


def _write_descriptions(plan: ExportPlan, out: Path, staging: Staging) -> None:
    """Config, and the adapter's config if there is one, in the bytes that `quantize` gives them."""
    written = plan.written
    main = main_dtype(written.config)
    quantization = plan.after.quantization_config(written.weights, plan.skipped, main)
    config = {**written.config, "quantization_config": quantization}
    output.write_json(staging, CONFIG_FILE, config)
    if written.report.results.layers:
        adapter = load_json(written.source / ADAPTER_CONFIG_NAME)
        adapter["base_model_name_or_path"] = out.name
        output.write_json(staging, ADAPTER_CONFIG_NAME, adapter)
