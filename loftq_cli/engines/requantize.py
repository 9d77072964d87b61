"""The whole `merge --requantize` run: merged weights become codes again, one at a time.

A weight is dequantized, gets the adapter, is rounded as `merge` writes it, and quantized at once: a
copy of the model in 16 bits lies nowhere, neither in memory nor on the disk. The codes are those
that `quantize` gives a layer without an adapter, with a search for scales where the container has
one. What that costs is measured afterwards, in the written files, as their library dequantizes
them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli import hardware, schema
from loftq_cli.checkpoint.safetensors import read_header
from loftq_cli.checkpoint.staging import Staging
from loftq_cli.containers.base import Weight
from loftq_cli.engines import output
from loftq_cli.engines.fingerprint import digest
from loftq_cli.engines.merge import (
    layers_to_check,
    merge_results,
    merged_weight,
    output_deviation,
    tell_likeness,
)
from loftq_cli.engines.merge_plan import plan_merge
from loftq_cli.engines.report_file import Report, finished_run, refuse_output, write_report
from loftq_cli.engines.requantize_plan import Asked, RequantizePlan, plan_requantize
from loftq_cli.engines.results import quantize_results
from loftq_cli.engines.rewriting import write_files
from loftq_cli.engines.tasks import LayerOutcome, initialize
from loftq_cli.engines.written import WeightFile
from loftq_cli.errors import LoftqError
from loftq_cli.models.companions import LeftOut
from loftq_cli.record import Record

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.schema import Document, MergeResults

_ROWS = 256


def requantize_directory(
    record: Record,
    source: Path,
    adapter: Path | None,
    out: Path,
    asked: Asked,
    *,
    dtype: str | None = None,
    resume: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Document[MergeResults]:
    """Writes the directory ``source`` quantized again, with ``adapter`` in its weights.

    Args:
        adapter: as for `plan_merge`; so is ``dtype``.
        asked: the container and its format.
        resume: an ``out`` that is complete will do.
        force: an ``out`` that is there is replaced.

    Raises:
        LoftqError: as `plan_merge` and `plan_requantize`, and whatever is wrong with a file or the
            disk.
    """
    began = time.perf_counter()
    refuse_output(out, force=force, resume=resume)
    with record.timing("plan"):
        merge = plan_merge(source, adapter, dtype, trust_remote_code=trust_remote_code)
        plan = plan_requantize(merge, asked, trust_remote_code=trust_remote_code)
    tell_likeness(merge, record)
    report = finished_run(out, plan.made_from()) if resume else None
    if report is not None:
        record.note(f"{out} is already complete")
    else:
        report = write_requantized(plan, out, record, began, force=force)
    container, results = plan.container, report.results
    with record.timing("check"):
        deviations = list(_deviations(plan, out))
    requantized = schema.Requantized(
        container=container.name,
        quant_type=container.quant_type,
        block_size=container.block_size,
        double_quant=container.double_quant,
        stored_bits=results.totals.stored_bits or 0.0,
        weight_error_relative=results.totals.weight_error_relative or 0.0,
        layers=[
            schema.RequantizedLayer(
                name=layer.name,
                shape=layer.shape,
                bits=layer.bits or 0,
                weight_error_relative=layer.weight_error_relative or 0.0,
            )
            for layer in results.without_adapter
        ],
    )
    return record.document(
        merge_results(
            merge,
            out,
            form=plan.planned,
            files=results.files,
            checked_layers=len(deviations),
            output_deviation=max(deviations),
            requantized=requantized,
            seconds=time.perf_counter() - began,
        ),
        model=report.model,
    )


def write_requantized(
    plan: RequantizePlan, out: Path, record: Record, began: float, *, force: bool
) -> Report:
    """Writes what is planned, but for files that an interrupted run has finished.

    Returns:
        the report of the output.
    """
    merge, written, made_from = plan.merge, plan.merge.written, plan.made_from()
    protected = [written.source, merge.adapter.directory]
    with Staging(out, fingerprint=made_from, force=force, protected=protected) as staging:
        write_files(
            written,
            staging,
            record,
            doing="quantizing",
            form=plan.planned,
            convert=partial(_converted, plan),
            copied=merge.copied,
            replaced=merge.heads,
        )
        output.write_config(plan.as_written, staging, merge.architecture, written.config)
        with (
            record.timing("measure"),
            record.progress("measuring", len(written.weights)) as progress,
        ):
            outcomes = []
            for each in _outcomes(plan, staging.directory):
                progress.advance(each.name)
                outcomes.append(each)
        before = written.report.results
        results = quantize_results(
            plan.as_written,
            plan.checkpoint,
            output=str(out),
            architecture=before.architecture,
            auto_class=before.auto_class,
            own_code=before.own_code,
            task_type=before.task_type,
            outcomes=outcomes,
            files=output.written_files(staging),
            not_copied=[LeftOut(each.name, each.reason) for each in before.not_copied],
            merged=schema.MergedFrom(
                source=str(written.source), adapter=str(merge.adapter.directory)
            ),
            fingerprint=digest(made_from),
            seconds=time.perf_counter() - began,
            peak_memory_bytes=hardware.peak_memory_bytes(),
        )
        results = _with_loader(results, before)
        document = record.document(results, model=written.report.model)
        # What lies there is what `quantize` writes, whichever command did it.
        kind = {"schema_name": written.report.schema_name}
        report = write_report(staging, document.model_copy(update=kind))
        staging.commit()
    return report


def _with_loader(
    results: schema.QuantizeResults, before: schema.QuantizeResults
) -> schema.QuantizeResults:
    """The same with who loads experts that are no stack any more, as in the directory before."""
    if results.experts is None or before.experts is None:
        return results
    experts = results.experts.model_copy(update={"loader": before.experts.loader})
    return results.model_copy(update={"experts": experts})


def _converted(
    plan: RequantizePlan, file: WeightFile, weight: Weight
) -> Iterator[tuple[str, memoryview]]:
    """The names and bytes of what a weight with the adapter in it is in the container."""
    try:
        W = merged_weight(plan.merge, file, weight)
        quantized = initialize(W, plan.layers[weight.module], plan.settings).quantized
    except LoftqError as error:
        raise error.within(weight.name) from error
    yield from plan.container.tensors(weight.name, quantized)


def _outcomes(plan: RequantizePlan, directory: Path) -> Iterator[LayerOutcome]:
    """What the written codes leave of each merged weight."""
    for name, file in plan.merge.written.files.items():
        for weight in file.weights:
            W = merged_weight(plan.merge, file, weight)
            left, norm = _distance(W, _stored(plan, directory / name, weight))
            error = left / norm if norm else 0.0
            yield LayerOutcome(weight.module, error, None, [], 0, norm, 0.0)


def _deviations(plan: RequantizePlan, directory: Path) -> Iterator[float]:
    """How far outputs of some layers are from those of the adapted ones."""
    for name, file, weight in layers_to_check(plan.merge):
        Q = _stored(plan, directory / name, weight)
        yield output_deviation(plan.merge, file, weight, Q)


def _stored(plan: RequantizePlan, path: Path, weight: Weight) -> Tensor:
    """What the codes in a written file dequantize to (out, in)."""
    header = read_header(path)
    tensors = {name: (header, info) for name, info in header.tensors.items()}
    after = plan.layers[weight.module].weight
    return plan.container.runtime(plan.container.read(tensors, after, "cpu"))


def _distance(W: Tensor, Q: Tensor) -> tuple[float, float]:
    """‖W − Q‖ and ‖W‖ in float64, some rows at a time."""
    pieces: Sequence[tuple[float, float]] = [
        (
            float((W[at : at + _ROWS].double() - Q[at : at + _ROWS].double()).norm()),
            float(W[at : at + _ROWS].double().norm()),
        )
        for at in range(0, W.shape[0], _ROWS)
    ]
    left, norms = zip(*pieces, strict=True)
    return math.hypot(*left), math.hypot(*norms)
