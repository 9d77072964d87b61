"""LoRA adapters on a loaded model: one from files, or a new one that changes nothing yet."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_DIRECTORY,
    ADAPTER_WEIGHTS,
    other_base,
)
from loftq_cli.checkpoint.index import load_json
from loftq_cli.checkpoint.safetensors import read_header, shown
from loftq_cli.errors import (
    CorruptCheckpoint,
    InvalidSetting,
    LoftqError,
    ModelNotFound,
    UnsafeCheckpoint,
)
from loftq_cli.models.source import MAX_REPORT_BYTES, REPORT_FILE


def own_adapter(directory: Path) -> Path | None:
    """Where `quantize` put the adapter beside a backbone; None if it is not its directory.

    Whether it can be used, even whether it is there, is for `attach_adapter` to find: without it
    the backbone is another model. Only where the report says that it is merged, there is none.
    """
    found, report = directory / ADAPTER_DIRECTORY, directory / REPORT_FILE
    if os.path.lexists(found):
        return found
    return found if report.exists() and not _is_merged(report) else None


def _is_merged(report: Path) -> bool:
    with suppress(LoftqError):
        results = load_json(report, MAX_REPORT_BYTES).get("results")
        return isinstance(results, dict) and bool(results.get("merged"))
    return False


def require_same_base(directory: Path, backbone: Path) -> None:
    """Refuses the adapter in ``directory`` on the ``backbone`` if it says that it is of another.

    Where one of them does not say which base it is, that is for PEFT and the shapes to find.

    Raises:
        CorruptCheckpoint: it was made or trained for other codes than these.
    """
    own = backbone / ADAPTER_DIRECTORY / ADAPTER_CONFIG
    theirs = directory / ADAPTER_CONFIG
    if not own.is_file() or not theirs.is_file():
        return
    if cause := other_base(load_json(theirs), load_json(own), backbone):
        raise CorruptCheckpoint(
            f"the adapter in {directory} does not belong to this model",
            cause=cause,
            hint="give the directory that it was trained on as the model",
        )


def attach_adapter(model: Any, directory: Path, trainable: bool = False) -> Any:
    """``model`` with the adapter in ``directory``, as PEFT loads it, ``trainable`` or frozen.

    Raises:
        ModelNotFound: there is no adapter.
        UnsafeCheckpoint: its weights are a pickle.
        CorruptCheckpoint: it is damaged, or belongs to another model.
    """
    header = read_header(adapter_weights(directory))
    from peft import PeftModel, get_peft_model_state_dict

    try:
        # Which keys are missing is found below, where it is an error and not a warning.
        with _silent():
            adapted = PeftModel.from_pretrained(model, directory, is_trainable=trainable)
            wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except Exception as error:  # whatever PEFT, or torch below it, may object to
        reason = " ".join(str(error).split())
        raise _foreign(directory, f"{reason[:197]}..." if len(reason) > 200 else reason) from error
    if missing := sorted(set(wanted) - set(header.tensors)):
        raise _foreign(
            directory, f"{len(missing)} of its tensors are missing, such as {shown(missing[0])}"
        )
    return adapted


def attach_fresh(
    model: Any,
    rank: int,
    task_type: str | None,
    target_modules: str | list[str] = "all-linear",
    meta: bool = False,
) -> Any:
    """``model`` with a new LoRA adapter: A random, B zero, so that its outputs stay the same.

    Args:
        meta: the model is on the meta device, and the adapter is to stay there too.
    """
    _require_room(model, rank)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=target_modules, task_type=task_type)
    try:
        # It warns that it transposes for Conv1D, which is what is wanted.
        with _silent():
            return get_peft_model(model, config, low_cpu_mem_usage=meta)
    except ValueError as error:
        raise InvalidSetting(
            "PEFT cannot put an adapter on this model", cause=" ".join(str(error).split())
        ) from error


def _require_room(model: Any, rank: int) -> None:
    """Refuses a rank beyond that of every layer: it would take memory and change nothing."""
    modules = dict(model.named_modules())
    sizes = {
        name: min(module.in_features, module.out_features)
        for name, module in modules.items()
        if hasattr(module, "in_features")
    } | {
        name: min(module.weight.shape) for name, module in modules.items() if hasattr(module, "nf")
    }
    largest = max(sizes.values(), default=rank)
    if rank > largest:
        raise InvalidSetting(
            f"rank {rank} is too large for every layer of this model",
            cause=f"the largest that any of them can use is {largest}",
            hint=f"--rank {largest}",
        )


@contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def adapter_weights(directory: Path) -> Path:
    """The adapter's weight file, once its config has been seen to be one.

    Raises:
        ModelNotFound: there is no adapter.
        UnsafeCheckpoint: its weights are a pickle.
        CorruptCheckpoint: it has no weights.
    """
    weights = directory / ADAPTER_WEIGHTS
    if not (directory / ADAPTER_CONFIG).is_file():
        raise ModelNotFound(
            f"no adapter in {directory}",
            cause=f"there is no {ADAPTER_CONFIG}"
            if directory.is_dir()
            else "there is no such directory",
            hint=f"give the directory that has {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} in it",
        )
    load_json(directory / ADAPTER_CONFIG)
    if weights.is_file():
        return weights
    if (directory / "adapter_model.bin").exists():
        raise UnsafeCheckpoint(
            f"{directory} has its adapter as a pickle only",
            cause="loading a pickle runs whatever code is in it",
            hint="load it where you trust it, and save_pretrained it again",
        )
    raise CorruptCheckpoint(f"{weights} is missing", cause="the adapter has a config, no weights")


def _foreign(directory: Path, cause: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"the adapter in {directory} does not fit this model",
        cause=cause,
        hint="give the model that the adapter was trained on: "
        f"base_model_name_or_path in its {ADAPTER_CONFIG} names it",
    )
