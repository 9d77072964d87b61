"""The whole `merge` run: a trained adapter folded into the weights that it was trained on.

Those are what the stored codes dequantize to, never the original weights: an adapter that starts as
LoftQ's corrects the error of the codes, and would add it to the original. One weight is held at a
time. The product of B and A and the sum are in float32, and rounded once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli import schema
from loftq_cli.checkpoint.index import load_json
from loftq_cli.checkpoint.safetensors import read_header
from loftq_cli.checkpoint.staging import Staging
from loftq_cli.checkpoint.tensors import load_tensor, rounded, tensor_memory
from loftq_cli.containers.base import Weight
from loftq_cli.engines import output
from loftq_cli.engines.merge_plan import MergePlan, plan_merge, start_of
from loftq_cli.engines.report_file import refuse_output
from loftq_cli.engines.rewriting import Form, write_files
from loftq_cli.engines.written import WeightFile
from loftq_cli.errors import CheckFailed, LoftqError
from loftq_cli.models.source import CONFIG_FILE, MERGE_FILE, README_FILE
from loftq_cli.models.trained_adapter import likeness
from loftq_cli.record import Record
from loftq_cli.report.merge import merged_card

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.schema import Document, MergeResults

_CHECKED_LAYERS = 8  # are read back, evenly spread
# The mean cosine between the A of a start and what was trained from it.
_LIKE = 0.1


def merge_directory(
    record: Record,
    source: Path,
    adapter: Path | None,
    out: Path,
    *,
    dtype: str | None = None,
    resume: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Document[MergeResults]:
    """Writes the directory ``source`` as a plain model with ``adapter`` in its weights.

    Args:
        adapter: as for `plan_merge`; so is ``dtype``.
        resume: an ``out`` that is complete will do.
        force: an ``out`` that is there is replaced.

    Raises:
        LoftqError: as `plan_merge`, and whatever is wrong with a file or the disk.
    """
    began = time.perf_counter()
    refuse_output(out, force=force, resume=resume)
    with record.timing("plan"):
        plan = plan_merge(source, adapter, dtype, trust_remote_code=trust_remote_code)
    tell_likeness(plan, record)
    made = _complete(plan, out) if resume else None
    if made is not None:
        record.note(f"{out} is already complete")
    else:
        made = write_merged(plan, out, record, force=force)
    results = merge_results(
        plan,
        out,
        form=plan.form,
        seconds=time.perf_counter() - began,
        **{key: made[key] for key in ("files", "checked_layers", "output_deviation")},
    )
    return record.document(results, model=plan.written.report.model)


def tell_likeness(plan: MergePlan, record: Record) -> None:
    """A warning where the adapter does not say its base, and looks like that of another."""
    start = start_of(plan)
    if start is not None and likeness(plan.adapter, start) < _LIKE:
        record.warn(
            f"nothing in {plan.adapter.directory} resembles the start in {start.directory}: it was "
            "begun anew on this base, trained far, or on another base of the same name, which "
            "nothing in it would tell"
        )


def merge_results(plan: MergePlan, out: Path, *, form: Form, **more: Any) -> MergeResults:
    """What a merge gave: ``form`` is what became of a weight, and ``more`` what was measured."""
    written = plan.written
    return schema.MergeResults(
        source=str(written.source),
        adapter=str(plan.adapter.directory),
        output=str(out),
        source_container=written.container.name,
        dtype=plan.main_dtype,
        quantized_layers=len(written.weights),
        merged_layers=len(plan.merged),
        replaced=sorted(plan.heads),
        input_bytes=written.bytes(written.container.planned),
        output_bytes=written.bytes(form),
        **more,
    )


def write_merged(plan: MergePlan, out: Path, record: Record, *, force: bool) -> dict[str, Any]:
    """Writes what is planned, but for files that an interrupted run has finished.

    Returns:
        what the output says of itself.
    """
    written, made_from = plan.written, plan.made_from()
    protected = [written.source, plan.adapter.directory]
    with Staging(out, fingerprint=made_from, force=force, protected=protected) as staging:
        write_files(
            written,
            staging,
            record,
            doing="merging",
            form=plan.form,
            convert=partial(_converted, plan),
            copied=plan.copied,
            replaced=plan.heads,
        )
        config = {
            key: value for key, value in written.config.items() if key != "quantization_config"
        }
        output.write_json(staging, CONFIG_FILE, output.config_in_dtype(config, plan.dtype))
        adapter = plan.adapter.directory.resolve().name
        card = merged_card(written.report.results, out.name, adapter, plan.main_dtype)
        output.write_text(staging, README_FILE, card)
        with record.timing("check"):
            checked, deviation = _check(plan, staging)
        made = {
            "made_from": made_from,
            "checked_layers": checked,
            "output_deviation": deviation,
            "files": [
                {"name": name, "bytes": each.bytes, "sha256": each.sha256}
                for name, each in sorted(staging.finished.items())
                if name != MERGE_FILE
            ],
        }
        output.write_json(staging, MERGE_FILE, made)
        staging.commit()
    return made


def _complete(plan: MergePlan, out: Path) -> dict[str, Any] | None:
    """What an output that this very plan gave says of itself; None if there is no such."""
    try:
        found = load_json(out / MERGE_FILE)
    except LoftqError:
        return None
    return found if found.get("made_from") == plan.made_from() else None


def _converted(
    plan: MergePlan, file: WeightFile, weight: Weight
) -> Iterator[tuple[str, memoryview]]:
    """The name and the bytes of a weight with the adapter in it.

    Those of a stack come with the first of its matrices, the ones of an expert at a time.
    """
    if (held := plan.architecture.stacks.restacked(weight.name)) is not None:
        if plan.form(weight):
            yield from _stacked(plan, file, held.place.tensor)
        return
    merged = merged_weight(plan, file, weight)
    yield weight.name, tensor_memory(merged.t() if weight.transposed else merged)


def _stacked(plan: MergePlan, file: WeightFile, parameter: str) -> Iterator[tuple[str, memoryview]]:
    import torch

    matrices = plan.stacks[parameter]
    stack = matrices[0][1].stack
    for start in range(0, len(matrices), len(stack.parts)):
        expert = matrices[start : start + len(stack.parts)]
        W = torch.cat([merged_weight(plan, file, weight) for weight, _ in expert])
        yield parameter, tensor_memory(W.t() if stack.transposed else W)


def merged_weight(plan: MergePlan, file: WeightFile, weight: Weight) -> Tensor:
    """A weight (out, in) with the adapter in it, in the dtype that it has in a plain model."""
    Q = plan.written.container.runtime(plan.written.stored(file, weight))
    (planned,) = plan.plain(weight)
    return rounded(plan.adapter.folded_into(Q, weight.module), planned.dtype, weight.name)


def _check(plan: MergePlan, staging: Staging) -> tuple[int, float]:
    """Reads some merged layers back, and holds their outputs against the adapted layers'.

    Returns:
        how many, and the largest relative deviation.

    Raises:
        CheckFailed: it is more than rounding makes.
    """
    import torch

    chosen = layers_to_check(plan)
    largest = 0.0
    for name, file, weight in chosen:
        header = read_header(staging.path(name))
        W = load_tensor(header, header.tensors[weight.name])
        rounding = torch.finfo(W.dtype).eps
        deviation = output_deviation(plan, file, weight, W.t() if weight.transposed else W)
        # Half of eps is the most that a value loses; float32 also loses in the sums.
        if not deviation <= 2 * rounding + 1e-5:
            raise CheckFailed(
                f"{weight.module} does not give the outputs of the adapted layer",
                cause=f"they deviate by {deviation:.2g}, and {W.dtype} rounds by {rounding:.2g}",
                hint="--dtype float32 keeps more",
            )
        largest = max(largest, deviation)
    return len(chosen), largest


def layers_to_check(plan: MergePlan) -> list[tuple[str, WeightFile, Weight]]:
    """Some merged layers, evenly spread, with the name of the file that each is in."""
    merged = [
        (name, file, weight)
        for name, file in plan.written.files.items()
        for weight in file.weights
        if weight.module in plan.adapter.pairs
    ]
    return merged[:: -(-len(merged) // _CHECKED_LAYERS)]


def output_deviation(plan: MergePlan, file: WeightFile, weight: Weight, W: Tensor) -> float:
    """How far the outputs of ``W`` (out, in) are from the adapted layer's, at one random input."""
    import torch

    x = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
    A, B, scaling = plan.adapter.factors(weight.module)
    Q = plan.written.container.runtime(plan.written.stored(file, weight))
    expected = Q.float() @ x + scaling * (B @ (A @ x))
    return float((W.float() @ x - expected).norm() / expected.norm().clamp_min(1e-30))
