"""The whole `export` run: the codes and scales of one directory in the other container of integers.

Every file becomes one of the same name: of a weight file all tensors, with the parts of a quantized
weight replaced by those of the other container; index, configs, report and README made anew; the
rest copied. One weight is held at a time, and what it becomes.

Each file is held against the size and hash of the report when it is read, and each weight against
the codes and scales that its container may have, so nothing is taken that was not written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli import __version__, schema
from loftq_cli.checkpoint.index import INDEX_FILE, load_json
from loftq_cli.checkpoint.safetensors import read_pieces
from loftq_cli.checkpoint.staging import Staging
from loftq_cli.checkpoint.writer import (
    copy_file,
    hash_file,
    require_free_space,
    write_safetensors,
)
from loftq_cli.containers.base import Damaged, Weight
from loftq_cli.engines import output
from loftq_cli.engines.export_plan import (
    ADAPTER_CONFIG_NAME,
    ExportPlan,
    FilePlan,
    not_as_reported,
    plan_export,
    require_same,
)
from loftq_cli.engines.report_file import Report, read_report, refuse_output, write_report
from loftq_cli.errors import LoftqError
from loftq_cli.models.companions import companions
from loftq_cli.models.source import CONFIG_FILE, main_dtype
from loftq_cli.record import Progress, Record

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
        quantized_layers=len(plan.weights),
        files=report.results.files,
        input_bytes=plan.model_bytes(plan.before),
        output_bytes=plan.model_bytes(plan.after),
        source_stored_bits=plan.stored_bits(plan.before),
        stored_bits=plan.stored_bits(plan.after),
        seconds=time.perf_counter() - began,
    )
    return record.document(results, model=plan.report.model)


def write_export(plan: ExportPlan, out: Path, record: Record, *, force: bool) -> Report:
    """Writes what is planned, but for files that an interrupted run has finished.

    Returns:
        the report of the output.
    """
    hashes = {name: each.sha256 for name, each in plan.listed.items()}
    fingerprint = {"loftq": __version__, "files": hashes, "container": plan.after.name}
    with Staging(out, fingerprint=fingerprint, force=force, protected=[plan.source]) as staging:
        output.tell_what_is_finished(staging, record)
        kept = sum(entry.bytes for entry in staging.finished.values())
        copied = sum(plan.listed[name].bytes for name in plan.copied)
        require_free_space(out, plan.model_bytes(plan.after) + copied - kept)
        with (
            record.timing("files"),
            record.progress("exporting", len(plan.weights)) as progress,
            output.telling_what_is_kept(staging, list(plan.files), record),
        ):
            for name, file in plan.files.items():
                if name in staging.finished:
                    for weight in file.weights:
                        progress.advance(weight.module)
                else:
                    _write_weights(plan, name, file, staging, progress)
            _copy_files(plan, staging)
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


def _write_weights(
    plan: ExportPlan, name: str, file: FilePlan, staging: Staging, progress: Progress
) -> None:
    def chunks() -> Iterator[tuple[str, memoryview]]:
        for entry in file.entries:
            if isinstance(entry, Weight):
                progress.start(entry.module)
                yield from _converted(plan, file, entry)
                progress.advance(entry.module)
            else:
                for piece in read_pieces(file.header, entry):
                    yield entry.name, piece

    # The header was read before: what changes the file from now on is seen when a tensor is read.
    require_same(file.header.path, hash_file(file.header.path), plan.listed[name])
    planned = file.tensors(plan.after)
    staging.record(name, write_safetensors(staging.path(name), planned, chunks()))


def _converted(
    plan: ExportPlan, file: FilePlan, weight: Weight
) -> Iterator[tuple[str, memoryview]]:
    """The names and bytes of what a weight is in the other container."""
    tensors = {name: (file.header, info) for name, info in file.header.tensors.items()}
    try:
        stored = plan.before.read(tensors, weight, "cpu")
        plan.before.require_codes(stored)
    except Damaged as error:
        raise not_as_reported(weight.module, str(error)) from None
    yield from plan.after.tensors(weight.name, plan.before.quantized(stored))


def _copy_files(plan: ExportPlan, staging: Staging) -> None:
    for name in plan.copied:
        if name not in staging.finished:
            written = copy_file(plan.source / name, staging.path(name))
            require_same(plan.source / name, written, plan.listed[name])
            staging.record(name, written)
    for folder in companions(plan.source, with_code=True).empty:
        staging.make_folder(folder)


def _write_descriptions(plan: ExportPlan, out: Path, staging: Staging) -> None:
    """Index, config and the adapter's config, in the bytes that `quantize` gives them."""
    if INDEX_FILE in plan.listed:
        files = {name: file.tensors(plan.after) for name, file in plan.files.items()}
        output.write_index(staging, files)
    main = main_dtype(plan.config)
    quantization = plan.after.quantization_config(plan.weights, plan.skipped, main)
    output.write_json(staging, CONFIG_FILE, {**plan.config, "quantization_config": quantization})
    adapter = load_json(plan.source / ADAPTER_CONFIG_NAME)
    adapter["base_model_name_or_path"] = out.name
    output.write_json(staging, ADAPTER_CONFIG_NAME, adapter)
