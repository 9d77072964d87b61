"""Everything in the output directory beside the tasks' weight files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_DIRECTORY,
    ADAPTER_NAME,
    adapter_config,
    adapter_part,
)
from loftq_cli.checkpoint.index import INDEX_FILE, Checkpoint
from loftq_cli.checkpoint.safetensors import read_header, read_tensor
from loftq_cli.checkpoint.staging import Staging
from loftq_cli.checkpoint.tensors import load_pieces
from loftq_cli.checkpoint.writer import (
    PlannedTensor,
    WrittenFile,
    copy_file,
    write_bytes_atomically,
    write_safetensors,
)
from loftq_cli.engines.plan import Plan, PlannedLayer

if TYPE_CHECKING:
    from loftq_cli.models.architecture import Architecture
    from loftq_cli.models.companions import Companions


def join_adapter(
    plan: Plan,
    checkpoint: Checkpoint,
    staging: Staging,
    architecture: Architecture,
    base_model: str,
) -> None:
    """Joins the tasks' shares to one `adapter_model.safetensors`, tensor by tensor."""
    heads = {
        f"base_model.model.{parameter}": checkpoint.tensors[tensor]
        for tensor, parameter in architecture.trained_heads(checkpoint.tensors).items()
    }

    def tensors() -> Iterator[tuple[str, memoryview | bytes]]:
        for task in plan.tasks:
            header = read_header(staging.path(adapter_part(task.file_name)))
            for tensor, info in header.tensors.items():
                yield tensor, read_tensor(header, info)
        for name, (header, info) in heads.items():
            for piece in load_pieces(header, info):
                yield name, bytes(piece)  # the piece's buffer is used again

    if ADAPTER_NAME not in staging.finished:
        planned = [
            *plan.adapter_tensors(plan.layers),
            *(PlannedTensor(name, info.dtype, info.shape) for name, (_, info) in heads.items()),
        ]
        staging.record(
            ADAPTER_NAME, write_safetensors(staging.path(ADAPTER_NAME), planned, tensors())
        )
    for task in plan.tasks:
        staging.path(adapter_part(task.file_name)).unlink(missing_ok=True)
    settings = plan.settings
    adapted = [planned for planned in plan.layers if planned.adapted]
    # Ranks that are all the same, though another than was asked for, need no pattern.
    same = {planned.stored_rank for planned in adapted}
    rank = same.pop() if len(same) == 1 else settings.rank
    others = {
        _pattern(planned.layer.module, adapted): planned.stored_rank
        for planned in adapted
        if planned.stored_rank != rank
    }
    config = adapter_config(
        base_model=base_model,
        task_type=architecture.task_type,
        rank=rank,
        lora_alpha=settings.alpha_of(rank),
        use_rslora=settings.use_rslora,
        target_modules=_target_modules(plan, architecture),
        rank_pattern=others,
        alpha_pattern={name: settings.alpha_of(other) for name, other in others.items()},
        fan_in_fan_out=not settings.container.quantizes
        and any(planned.layer.transposed for planned in adapted),
    )
    write_json(staging, f"{ADAPTER_DIRECTORY}/{ADAPTER_CONFIG}", config)


def _pattern(module: str, adapted: Sequence[PlannedLayer]) -> str:
    """What PEFT finds this module by, and no other that is adapted: its path where that will do.

    PEFT takes a key for a regular expression that the end of a path has to match, so the path of
    one module may be found in that of another (`layers.0.fc1` in `vision.layers.0.fc1`).
    """
    rule = re.compile(rf"(.*\.)?({module})")
    found = [each.layer.module for each in adapted if rule.fullmatch(each.layer.module)]
    return module if found == [module] else f"^{re.escape(module)}"


def _target_modules(plan: Plan, architecture: Architecture) -> list[str]:
    """The adapted modules: the ends of their names where those say it all, else whole paths."""
    adapted = {planned.layer.module for planned in plan.layers if planned.adapted}
    ends = {name.rpartition(".")[2] for name in adapted}
    hit = {name for name in architecture.module_names if name.rpartition(".")[2] in ends}
    return sorted(ends if hit == adapted else adapted)


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
        files = {
            tensor.name: task.file_name
            for task in plan.tasks
            for tensor in plan.model_tensors(task)
        }
        index = {
            "metadata": {"total_size": plan.model_bytes},
            "weight_map": dict(sorted(files.items())),
        }
        write_json(staging, INDEX_FILE, index)
    container = plan.settings.container
    if container.quantizes:
        skipped = architecture.skip_modules([planned.layer for planned in plan.layers])
        dtypes = [planned.layer.dtype for planned in plan.layers]
        quantization = container.quantization_config(skipped, max(set(dtypes), key=dtypes.count))
        config = {**config, "quantization_config": quantization}
    if plan.settings.dtype is not None:
        config = {**_in_dtype(config, plan.settings.dtype), "dtype": plan.settings.dtype}
    write_json(staging, "config.json", config)


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


def written_files(staging: Staging) -> list[WrittenFile]:
    """Every file that the output will have, with its hash, by name."""
    parts = adapter_part("")
    return [
        WrittenFile(name, entry.bytes, entry.sha256)
        for name, entry in sorted(staging.finished.items())
        if not name.startswith(parts)
    ]


def write_json(staging: Staging, name: str, content: dict[str, Any]) -> None:
    """One of the small files: readable, and the same bytes for the same content."""
    write_text(staging, name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(staging: Staging, name: str, text: str) -> None:
    staging.record(name, write_bytes_atomically(staging.path(name), text.encode()))
