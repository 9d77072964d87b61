"""From a plan and what came out of it to the results in the document of `quantize`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

from loftq_cli import schema
from loftq_cli.engines.experts import expert_adapters, experts_of
from loftq_cli.engines.plan import Plan, stored
from loftq_cli.engines.settings import Settings
from loftq_cli.models.hub_files import HubFile
from loftq_cli.models.layers import LinearLayer, last_part

if TYPE_CHECKING:
    from loftq_cli.checkpoint.index import Checkpoint
    from loftq_cli.checkpoint.writer import WrittenFile
    from loftq_cli.engines.tasks import LayerOutcome
    from loftq_cli.models.calibration import Calibration
    from loftq_cli.models.companions import LeftOut

# Relative errors by their name in the document: what an outcome calls them, and the norm that they
# are relative to.
_ERRORS = {
    "weight_error_relative": ("error", "norm"),
    "quantized_only_error_relative": ("quantized_only_error", "norm"),
    "backbone_error_relative": ("backbone_error", "norm"),
    "output_error_relative": ("output_error", "output_norm"),
    "quantized_only_output_error_relative": ("quantized_only_output_error", "output_norm"),
}


def quantize_results(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    output: str,
    architecture: str,
    auto_class: str | None = None,
    own_code: bool = False,
    task_type: str | None = None,
    counted_by: Literal["class", "names"] = "class",
    outcomes: Sequence[LayerOutcome] = (),
    target_parameters: Sequence[str] = (),
    expert_errors: Sequence[float] | None = None,
    files: Sequence[WrittenFile] = (),
    not_copied: Sequence[LeftOut] = (),
    merged: schema.MergedFrom | None = None,
    fingerprint: str | None = None,
    calibration: schema.CalibratedOn | None = None,
    distillation: schema.Distillation | None = None,
    seconds: float | None = None,
    peak_memory_bytes: int | None = None,
) -> schema.QuantizeResults:
    """The results; without outcomes those of a dry run, whose measured fields are null."""
    settings = plan.settings
    sizes = {name: info.nbytes for name, (_, info) in checkpoint.tensors.items()}
    total_bytes = sum(sizes.values())
    # Curves are of outputs where they were fitted, and of the start before a distillation.
    layers = _layers(plan, outcomes, sizes, curves=distillation is None)
    return schema.QuantizeResults(
        output=output,
        dry_run=not outcomes,
        architecture=architecture,
        auto_class=auto_class,
        own_code=own_code,
        task_type=task_type,
        counted_by=counted_by,
        conv1d=sorted(
            {last_part(each.layer.module) for each in plan.layers if each.layer.transposed}
        ),
        merged=merged,
        fingerprint=fingerprint,
        settings=_settings(settings, calibration),
        evened=[list(group) for group in plan.evened],
        layers=[each for each in layers if isinstance(each, schema.AdaptedLayer)],
        without_adapter=[each for each in layers if isinstance(each, schema.PlainLayer)],
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
        experts=experts_of(
            (entry for task in plan.tasks for entry in task.entries),
            settings,
            sum(info.elements for info in checkpoint.infos),
        ),
        expert_adapters=expert_adapters(plan.stacks, settings, target_parameters, expert_errors),
        distillation=distillation,
        files=[schema.WrittenFile(name=f.name, bytes=f.bytes, sha256=f.sha256) for f in files],
        source_files=[
            schema.SourceFile(
                name=name,
                bytes=header.file_bytes,
                header_sha256=header.sha256,
                etag=header.source.etag
                if outcomes and isinstance(header.source, HubFile)
                else None,
            )
            for name, header in sorted(checkpoint.headers.items())
        ],
        streamed_from=_hub_of(checkpoint) if outcomes else None,
        not_copied=[schema.NotCopied(name=each.name, reason=each.reason) for each in not_copied],
        totals=schema.QuantizeTotals(
            **{field: _overall(outcomes, *names) for field, names in _ERRORS.items()},
            **_bits_a_weight(plan, measured=bool(outcomes)),
            input_bytes=total_bytes,
            output_bytes=plan.model_bytes
            if outcomes
            else plan.model_bytes - _code_bytes(plan) + _foreseen_bytes(plan),
            adapter_bytes=plan.adapter_bytes,
            peak_memory_bytes=peak_memory_bytes,
            parameters=sum(info.elements for info in checkpoint.infos),
            trainable_parameters=plan.trainable_parameters,
            seconds=seconds,
        ),
    )


def _hub_of(checkpoint: Checkpoint) -> str | None:
    """Where the weights are, if they are not on a disk."""
    sources = [header.source for header in checkpoint.headers.values()]
    return next((each.endpoint for each in sources if isinstance(each, HubFile)), None)


def _read_bytes(layer: LinearLayer, sizes: Mapping[str, int]) -> int:
    """What the layer's weight takes in the source."""
    return sizes[layer.source] // (1 if layer.place is None else layer.place.count)


def _layers(
    plan: Plan, outcomes: Sequence[LayerOutcome], sizes: Mapping[str, int], *, curves: bool
) -> list[schema.AdaptedLayer | schema.PlainLayer]:
    """What the document says of each layer; ``sizes`` are the bytes of the source's tensors.

    Errors after each iteration are there with ``curves``.
    """
    settings, total_bytes = plan.settings, sum(sizes.values())
    measured = {outcome.name: outcome for outcome in outcomes}
    # What decides these is not measured in a dry run.
    bits_open = not outcomes and settings.target_bits is not None
    ranks_open = not outcomes and settings.rank_budget
    found: list[schema.AdaptedLayer | schema.PlainLayer] = []
    for planned in plan.layers:
        outcome, nbytes = measured.get(planned.layer.module), _read_bytes(planned.layer, sizes)
        fields: dict[str, Any] = {
            "name": planned.layer.module,
            "shape": planned.shape,
            "bits": None if bits_open else planned.bits,
            **{field: getattr(outcome, name, None) for field, (name, _) in _ERRORS.items()},
            "bytes": nbytes,
            "share_of_bytes": nbytes / total_bytes,
        }
        if not planned.adapted:
            found.append(schema.PlainLayer(reason=planned.reason, **fields))
            continue
        found.append(
            schema.AdaptedLayer(
                rank=None if ranks_open else planned.rank,
                stored_rank=planned.stored_rank if planned.padding else None,
                iterations=len(outcome.error_curve) if outcome else settings.iterations or 0,
                best_iteration=outcome.best_iteration if outcome else None,
                error_curve=outcome.error_curve if outcome and curves else [],
                seconds=outcome.seconds if outcome else None,
                **fields,
            )
        )
    return found


def _settings(
    settings: Settings, calibration: schema.CalibratedOn | None
) -> schema.QuantizeSettings:
    fields = {**asdict(settings), **asdict(settings.container)}
    fields["rslora"] = fields.pop("use_rslora")
    fields["container"] = fields.pop("container_name")
    if calibration is None and settings.calibration is not None:  # of which no token was seen yet
        calibration = schema.CalibratedOn(sha256=settings.calibration.sha256)
    if calibration is None:
        del fields["calibration_order"]
    return schema.QuantizeSettings(**{**fields, "calibration": calibration})


def calibrated_on(calibration: Calibration) -> schema.CalibratedOn:
    """What a report says of the calibration text."""
    return schema.CalibratedOn(
        sha256=calibration.text_sha256, windows=calibration.windows, tokens=calibration.tokens
    )


def _bits_a_weight(plan: Plan, *, measured: bool) -> dict[str, float]:
    """Over the planned layers; those that are still to be ``measured`` get what was asked for."""
    settings, code_bits = plan.settings, plan.settings.container.code_bits
    in_file = 8 * (_code_bytes(plan) if measured else _foreseen_bytes(plan))
    weights = sum(planned.layer.parameters for planned in plan.layers)
    spared = sum(
        (code_bits(planned.bits) - planned.bits) * planned.layer.parameters
        for planned in plan.layers
    )
    told = (in_file - spared) / weights
    if not measured and settings.target_bits is not None:
        told = in_file / weights - (code_bits(settings.bits) - settings.target_bits)
    return {"stored_bits": in_file / weights, "information_bits": told}


def _code_bytes(plan: Plan, bits: int | None = None) -> int:
    """Of the planned layers in the file, in other ``bits`` if given."""
    return sum(
        tensor.nbytes
        for each in plan.layers
        for tensor in stored(each if bits is None else replace(each, bits=bits), plan.settings)
    )


def _foreseen_bytes(plan: Plan) -> int:
    """The same where the bits are not measured yet: files grow evenly with them."""
    settings = plan.settings
    if settings.target_bits is None:
        return _code_bytes(plan)
    low, high = settings.container.widths[0], settings.container.widths[-1]
    least, most = _code_bytes(plan, low), _code_bytes(plan, high)
    return least + round((most - least) * (settings.target_bits - low) / (high - low))


def _overall(outcomes: Sequence[LayerOutcome], field: str, norm: str) -> float | None:
    """The relative error of all layers taken as one long vector; None where one is not known.

    Experts are none of those whose outputs are known.
    """
    outcomes = [outcome for outcome in outcomes if getattr(outcome, norm) is not None]
    errors = [getattr(outcome, field) for outcome in outcomes]
    if not outcomes or None in errors:
        return None
    norms = [getattr(outcome, norm) for outcome in outcomes]
    lost = math.hypot(*(error * size for error, size in zip(errors, norms, strict=True)))
    whole = math.hypot(*norms)
    return lost / whole if whole else 0.0
