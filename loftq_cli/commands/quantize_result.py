"""From a plan and what came out of it to the result document of `quantize`, and back."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli import schema
from loftq_cli.engines.plan import Plan, PlannedLayer, Settings
from loftq_cli.errors import LoftqError, OutputExists
from loftq_cli.models.layers import last_part
from loftq_cli.models.source import REPORT_FILE

if TYPE_CHECKING:
    from loftq_cli.checkpoint.index import Checkpoint
    from loftq_cli.checkpoint.staging import Staging
    from loftq_cli.checkpoint.writer import WrittenFile
    from loftq_cli.engines.tasks import LayerOutcome
    from loftq_cli.models.spec import ResolvedModel

Report = schema.Document[schema.QuantizeResults]


def results_of(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    output: str,
    architecture: str,
    task_type: str | None,
    outcomes: Sequence[LayerOutcome] = (),
    files: Sequence[WrittenFile] = (),
    fingerprint: str | None = None,
    seconds: float | None = None,
    peak_memory_bytes: int | None = None,
) -> schema.QuantizeResults:
    """The results; without outcomes those of a dry run, whose measured fields are null."""
    measured = {outcome.name: outcome for outcome in outcomes}
    total_bytes = sum(info.nbytes for _, info in checkpoint.tensors.values())

    def share(tensor: str) -> tuple[int, float]:
        nbytes = checkpoint.tensors[tensor][1].nbytes
        return nbytes, nbytes / total_bytes

    def adapted(planned: PlannedLayer) -> schema.AdaptedLayer:
        outcome = measured.get(planned.layer.module)
        nbytes, share_of_bytes = share(planned.layer.tensor)
        return schema.AdaptedLayer(
            name=planned.layer.module,
            shape=planned.shape,
            bits=plan.settings.bits,
            rank=plan.settings.rank,
            weight_error_relative=outcome.error if outcome else None,
            quantized_only_error_relative=outcome.quantized_only_error if outcome else None,
            iterations=plan.settings.iterations if plan.settings.init == "loftq" else 0,
            best_iteration=outcome.best_iteration if outcome else None,
            error_curve=outcome.error_curve if outcome else [],
            seconds=outcome.seconds if outcome else None,
            bytes=nbytes,
            share_of_bytes=share_of_bytes,
        )

    def plain(planned: PlannedLayer) -> schema.PlainLayer:
        outcome = measured.get(planned.layer.module)
        nbytes, share_of_bytes = share(planned.layer.tensor)
        return schema.PlainLayer(
            name=planned.layer.module,
            shape=planned.shape,
            bits=plan.settings.bits,
            reason="not among --target-modules",
            quantized_only_error_relative=outcome.quantized_only_error if outcome else None,
            bytes=nbytes,
            share_of_bytes=share_of_bytes,
        )

    return schema.QuantizeResults(
        output=output,
        dry_run=not outcomes,
        architecture=architecture,
        task_type=task_type,
        conv1d=sorted(
            {last_part(each.layer.module) for each in plan.layers if each.layer.transposed}
        ),
        fingerprint=fingerprint,
        settings=_settings(plan.settings),
        layers=[adapted(planned) for planned in plan.layers if planned.adapted],
        without_adapter=[plain(planned) for planned in plan.layers if not planned.adapted],
        untouched=[
            schema.UntouchedTensor(
                name=left.tensor,
                shape=list(left.shape),
                reason=left.reason,
                bytes=left.bytes,
                share_of_bytes=left.bytes / total_bytes,
            )
            for left in plan.left
        ],
        files=[schema.WrittenFile(name=f.name, bytes=f.bytes, sha256=f.sha256) for f in files],
        source_files=[
            schema.SourceFile(name=name, bytes=header.file_bytes, header_sha256=header.sha256)
            for name, header in sorted(checkpoint.headers.items())
        ],
        totals=schema.QuantizeTotals(
            weight_error_relative=_overall(outcomes, "error"),
            quantized_only_error_relative=_overall(outcomes, "quantized_only_error"),
            input_bytes=total_bytes,
            output_bytes=plan.model_bytes,
            adapter_bytes=plan.adapter_bytes,
            peak_memory_bytes=peak_memory_bytes,
            parameters=sum(info.elements for _, info in checkpoint.tensors.values()),
            trainable_parameters=plan.trainable_parameters,
            seconds=seconds,
        ),
    )


def _settings(settings: Settings) -> schema.QuantizeSettings:
    four_bits = settings.bits == 4
    return schema.QuantizeSettings(
        bits=settings.bits,
        quant_type=settings.quant_type if four_bits else "int8",
        block_size=settings.block_size if four_bits else None,
        double_quant=settings.double_quant and four_bits,
        rank=settings.rank,
        lora_alpha=settings.lora_alpha,
        rslora=settings.use_rslora,
        iterations=settings.iterations,
        init=settings.init,
        svd=settings.svd,
        target_modules=list(settings.target_modules),
        seed=settings.seed,
    )


def _overall(outcomes: Sequence[LayerOutcome], field: str) -> float | None:
    """The relative error of all quantized weights taken as one long vector."""
    norm = math.fsum(outcome.norm**2 for outcome in outcomes)
    if not outcomes:
        return None
    lost = math.fsum((getattr(outcome, field) * outcome.norm) ** 2 for outcome in outcomes)
    return math.sqrt(lost / norm) if norm else 0.0


def identity_of(model: ResolvedModel) -> schema.ModelIdentity:
    return schema.ModelIdentity(id=model.id, revision=model.revision, source=model.source)


def digest(fingerprint: Mapping[str, Any]) -> str:
    """A fingerprint as one word, to be compared with that of another run."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def write_document(staging: Staging, document: Report) -> None:
    """The report and the README of the output directory."""
    from loftq_cli.engines.output import write_text
    from loftq_cli.report.card import card

    write_text(staging, REPORT_FILE, schema.dump_json(document))
    write_text(staging, "README.md", card(document))


def finished_run(output: Path, fingerprint: Mapping[str, Any]) -> Report | None:
    """The report of a complete output that these very settings made; None if there is no such."""
    from loftq_cli.commands.verify_result import read_report

    try:
        document = read_report(output)
    except LoftqError:
        return None
    return document if document.results.fingerprint == digest(fingerprint) else None


def refuse_to_replace_foreign(output: Path) -> None:
    """--force replaces what loftq wrote, or an empty directory, and nothing else.

    Raises:
        OutputExists: there is something else in the directory.
    """
    if output.is_dir() and any(output.iterdir()) and not (output / REPORT_FILE).is_file():
        raise OutputExists(
            f"{output} was not written by loftq, and --force would delete it",
            cause=f"it has no {REPORT_FILE}",
            hint="choose another --output, or empty the directory yourself",
        )
