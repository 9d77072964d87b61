"""What `load` and `generate` share: a model loaded for a run, with the reason for every choice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loftq_cli.commands.run import Run

if TYPE_CHECKING:
    from loftq_cli.models.loading import LoadedModel
    from loftq_cli.schema import ModelIdentity


class Where(NamedTuple):
    device: str
    dtype: str
    reason: str  # for the device


def choose(run: Run, directory: Path, device: str, dtype: str) -> Where:
    """Device and dtype for the model in ``directory``; the run records both with the reason."""
    from loftq_cli import hardware
    from loftq_cli.models.loading import stored_dtype
    from loftq_cli.models.source import read_config

    with run.timing("import"):
        chosen_device = hardware.resolve_device(device)
    stored = stored_dtype(read_config(directory))
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
    run.quiet_libraries()
    from loftq_cli.models.loading import load_model
    from loftq_cli.models.spec import resolve_model
    from loftq_cli.schema import ModelIdentity

    with run.timing("resolve"):
        found = resolve_model(spec, with_code=trust_remote_code)
    where = choose(run, found.directory, device, dtype)
    loaded = load_model(
        found.directory,
        device=where.device,
        dtype=where.dtype,
        adapter=adapter,
        fresh_rank=fresh_rank,
        trust_remote_code=trust_remote_code,
        clock=run.timing,
    )
    identity = ModelIdentity(id=found.id, revision=found.revision, source=found.source)
    return identity, loaded, where


def build_for_run(
    run: Run, spec: str, device: str, dtype: str, *, trust_remote_code: bool = False
) -> tuple[ModelIdentity, LoadedModel, Where]:
    """The same from the model's config alone, with random weights."""
    run.quiet_libraries()
    raise NotImplementedError
