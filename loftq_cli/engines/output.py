"""Everything in the output directory beside the tasks' weight files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_DIRECTORY,
    ADAPTER_NAME,
    PREFIX,
    adapter_part,
)
from loftq_cli.checkpoint.index import INDEX_FILE, Checkpoint
from loftq_cli.checkpoint.safetensors import read_header, read_tensor
from loftq_cli.checkpoint.staging import Staging
from loftq_cli.checkpoint.writer import (
    PlannedTensor,
    WrittenFile,
    copy_file,
    write_bytes_atomically,
    write_safetensors,
)
from loftq_cli.engines.adapter_settings import adapter_settings
from loftq_cli.engines.expert_starts import ExpertStarts, adapted_stacks
from loftq_cli.engines.pipeline import Chunk, copied
from loftq_cli.engines.plan import Plan, skip_list
from loftq_cli.formats import DTYPE_NAMES
from loftq_cli.models.source import CONFIG_FILE, README_FILE, REPORT_FILE
from loftq_cli.record import Progress, Record

if TYPE_CHECKING:
    from loftq_cli.engines.distilling import Distilled
    from loftq_cli.models.architecture import Architecture
    from loftq_cli.models.companions import Companions


def join_adapter(
    plan: Plan,
    checkpoint: Checkpoint,
    staging: Staging,
    architecture: Architecture,
    *,
    base_model: str,
    base: str,
    device: str,
    record: Record,
    distilled: Distilled | None = None,
) -> None:
    """Joins the tasks' shares to one `adapter_model.safetensors`, tensor by tensor.

    Adapters that were ``distilled`` are there instead of those shares, and what the manifest is to
    keep of them instead of the experts' errors. After them come the adapters of experts, which are
    computed now on ``device``, and the heads that PEFT trains beside the adapter, as they are in
    the checkpoint.
    """
    tensors_of = {
        parameter: tensor
        for tensor, parameter in architecture.parameters_of(checkpoint.tensors).items()
    }
    heads = {
        f"{PREFIX}{parameter}": checkpoint.tensors[tensors_of[parameter]]
        for parameter in plan.trained_heads
    }

    stacks = adapted_stacks(plan, architecture)
    count = sum(len(place.stack.experts) for place in stacks)

    def shares() -> Iterator[Chunk]:
        for task in plan.tasks:
            header = read_header(staging.path(adapter_part(task.file_name)))
            for tensor, info in header.tensors.items():
                yield tensor, read_tensor(header, info)

    def tensors(experts: ExpertStarts) -> Iterator[Chunk]:
        yield from shares() if distilled is None else distilled.chunks()
        yield from experts.tensors()
        for name, (header, info) in heads.items():
            yield from copied(name, header, info)

    if ADAPTER_NAME not in staging.finished:
        shown = record.progress("starting experts", count) if count else nullcontext(Progress())
        with shown as progress:
            experts = ExpertStarts(plan, checkpoint, staging, stacks, device, progress)
            planned = [
                *plan.adapter_tensors(plan.layers),
                *experts.planned,
                *(PlannedTensor(name, info.dtype, info.shape) for name, (_, info) in heads.items()),
            ]
            path = staging.path(ADAPTER_NAME)
            joined = write_safetensors(path, planned, tensors(experts))
        payload = experts.relative_errors() if distilled is None else distilled.kept
        staging.record(ADAPTER_NAME, joined, payload)
    for task in plan.tasks:
        staging.path(adapter_part(task.file_name)).unlink(missing_ok=True)
    config = adapter_settings(plan, architecture, base_model, base)
    write_json(staging, f"{ADAPTER_DIRECTORY}/{ADAPTER_CONFIG}", config)


def write_model_files(
    plan: Plan,
    staging: Staging,
    architecture: Architecture,
    config: dict[str, Any],
    beside: Companions,
) -> None:
    """Config, index, and the files that go with the weights."""
    for each in beside.files:
        staging.record(each.name, copy_file(each.path, staging.path(each.name)))
    for name in beside.empty:
        staging.make_folder(name)
    if len(plan.tasks) > 1:
        write_index(staging, {task.file_name: plan.model_tensors(task) for task in plan.tasks})
    write_config(plan, staging, architecture, config)


def write_config(
    plan: Plan, staging: Staging, architecture: Architecture, config: dict[str, Any]
) -> None:
    """The model's config with what the plan makes of the weights."""
    container = plan.settings.container
    if container.quantizes:
        weights = [planned.weight for planned in plan.layers]
        skipped = skip_list(plan, architecture)
        dtypes = [weight.dtype for weight in weights]
        main = max(set(dtypes), key=dtypes.count)
        quantization = container.quantization_config(weights, skipped, main)
        if container.wants_dtype and not {"dtype", "torch_dtype"} & config.keys():
            config = {**config, "dtype": DTYPE_NAMES[main]}
        config = {**config, "quantization_config": quantization}
    write_json(staging, CONFIG_FILE, config_in_dtype(config, plan.settings.dtype))


def config_in_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """The config of the same model in ``dtype``; with None as it is."""
    return config if dtype is None else {**_in_dtype(config, dtype), "dtype": dtype}


def _in_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config and those of its parts (text, vision) with this dtype where they name one."""
    return {
        key: dtype
        if key in ("dtype", "torch_dtype")
        else _in_dtype(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }


def write_index(staging: Staging, files: Mapping[str, Sequence[PlannedTensor]]) -> None:
    """Which of the weight files has which tensor."""
    index = {
        "metadata": {"total_size": sum(each.nbytes for held in files.values() for each in held)},
        "weight_map": dict(
            sorted((each.name, name) for name, held in files.items() for each in held)
        ),
    }
    write_json(staging, INDEX_FILE, index)


def tell_what_is_finished(staging: Staging, record: Record) -> None:
    """Says so where this run goes on with what an interrupted one left."""
    if staging.finished:
        files = len(staging.finished)
        record.note(f"going on with {staging.partial}: {files} files are finished")


@contextmanager
def telling_what_is_kept(staging: Staging, names: Sequence[str], record: Record) -> Iterator[None]:
    """Where Ctrl-C or SIGTERM ends what is inside: how many of these weight files are finished."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and staging.finished:
            finished = sum(name in staging.finished for name in names)
            record.note(
                f"{finished} of {len(names)} weight files are kept in {staging.partial}; "
                "run the same line again to go on"
            )
        raise


def written_files(staging: Staging) -> list[WrittenFile]:
    """Every file of the output so far, with its hash, by name: report and README come last."""
    parts = adapter_part("")
    return [
        WrittenFile(name, entry.bytes, entry.sha256)
        for name, entry in sorted(staging.finished.items())
        if not name.startswith(parts) and name not in (REPORT_FILE, README_FILE)
    ]


def write_json(staging: Staging, name: str, content: dict[str, Any]) -> None:
    """One of the small files: readable, and the same bytes for the same content."""
    write_text(staging, name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(staging: Staging, name: str, text: str) -> None:
    staging.record(name, write_bytes_atomically(staging.path(name), text.encode()))
