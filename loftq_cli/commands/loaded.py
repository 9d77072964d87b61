"""What `load` and `generate` share: a model loaded for a run, with the reason for every choice."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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


def choose(run: Run, directory: Path | None, device: str, dtype: str) -> Where:
    """Device and dtype for a model, by its config if it has one; recorded with the reasons."""
    from loftq_cli import hardware
    from loftq_cli.models.loading import stored_dtype
    from loftq_cli.models.source import read_config

    with timed(run, "import"):
        chosen_device = hardware.resolve_device(device)
    stored = None if directory is None else stored_dtype(read_config(directory))
    chosen_dtype = hardware.resolve_dtype(dtype, chosen_device.value, stored)
    run.resolved("device", *chosen_device)
    run.resolved("dtype", *chosen_dtype)
    return Where(chosen_device.value, chosen_dtype.value, chosen_device.reason)


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
    from loftq_cli.models.spec import resolve_model

    with timed(run, "resolve"):
        found = resolve_model(spec, with_code=trust_remote_code)
    where = choose(run, found.directory, device, dtype)
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


def build_for_run(
    run: Run, spec: str, device: str, dtype: str, *, trust_remote_code: bool = False
) -> tuple[ModelIdentity, LoadedModel, Where]:
    """The same from the model's config alone, with random weights."""
    from loftq_cli.models.known import known_model
    from loftq_cli.models.random_weights import random_model
    from loftq_cli.models.spec import local_model, resolve_model
    from loftq_cli.schema import ModelIdentity

    with timed(run, "resolve"):
        found = local_model(spec)
        # The table comes before the hub: this is for boxes without a network.
        if found is None and known_model(spec) is None:
            found = resolve_model(spec, with_code=trust_remote_code, with_weights=False)
    where = choose(run, None if found is None else found.directory, device, dtype)
    loaded = random_model(
        None if found is None else found.directory,
        spec,
        device=where.device,
        dtype=where.dtype,
        trust_remote_code=trust_remote_code,
        clock=partial(timed, run),
    )
    if found is None:
        return ModelIdentity(id=spec, source="known"), loaded, where
    return found.identity, loaded, where
