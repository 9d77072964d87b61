"""What commands share that load a model: where and in what, with the reason for every choice."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loftq_cli.commands.run import Run

if TYPE_CHECKING:
    from loftq_cli.models.loading import LoadedModel
    from loftq_cli.schema import ModelIdentity

_DOING = {
    "resolve": "finding the model",
    "import": "importing torch and transformers",
    "build": "building the model",
    "read": "reading the weights",
}


class Where(NamedTuple):
    device: str
    dtype: str
    reason: str  # for the device


def timed(run: Run, step: str) -> AbstractContextManager[None]:
    """Measures a step of loading, and names it to whoever watches."""
    return run.timing(step, _DOING[step])


def choose(
    run: Run, config: dict[str, Any], device: str, dtype: str, *, to_measure: bool = False
) -> Where:
    """Device and dtype for the model of this config.json, recorded with the reasons.

    ``to_measure`` is for models that are held against each other (see `resolve_dtype`).
    """
    from loftq_cli import hardware
    from loftq_cli.models.dtypes import stored_dtype

    chosen = hardware.resolve_device(device)
    kind = hardware.resolve_dtype(dtype, chosen.value, stored_dtype(config), to_measure=to_measure)
    run.resolved("device", *chosen)
    run.resolved("dtype", *kind)
    return Where(chosen.value, kind.value, chosen.reason)


def load_for_run(
    run: Run,
    spec: str,
    device: str,
    dtype: str,
    *,
    adapter: Path | None = None,
    fresh_rank: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[ModelIdentity, LoadedModel, Where]:
    """Finds the model, chooses device and dtype, and loads it with its adapter."""
    from loftq_cli.models.loading import load_model
    from loftq_cli.models.source import read_config
    from loftq_cli.models.spec import resolve_model

    with timed(run, "resolve"):
        found = resolve_model(spec, with_code=trust_remote_code)
    with timed(run, "import"):
        where = choose(run, read_config(found.directory), device, dtype)
    loaded = load_model(
        found.directory,
        device=where.device,
        dtype=where.dtype,
        adapter=adapter,
        fresh_rank=fresh_rank,
        trust_remote_code=trust_remote_code,
        clock=partial(timed, run),
    )
    return found.identity, loaded, where
