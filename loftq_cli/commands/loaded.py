"""What `load` and `generate` share: a model loaded for a run, with the reason for every choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from loftq_cli.commands.run import Run

if TYPE_CHECKING:
    from loftq_cli.models.loading import LoadedModel
    from loftq_cli.schema import ModelIdentity


class Where(NamedTuple):
    device: str
    dtype: str


def load_for_run(
    run: Run, spec: str, device: str, dtype: str
) -> tuple[ModelIdentity, LoadedModel, Where]:
    """Resolves the model, chooses device and dtype, loads, and records all three."""
    run.quiet_libraries()
    from loftq_cli import hardware
    from loftq_cli.models.loading import load_model, stored_dtype
    from loftq_cli.models.source import read_config
    from loftq_cli.models.spec import resolve_model
    from loftq_cli.schema import ModelIdentity

    with run.timing("resolve"):
        found = resolve_model(spec)
    chosen_device = hardware.resolve_device(device)
    stored = stored_dtype(read_config(found.directory))
    chosen_dtype = hardware.resolve_dtype(dtype, chosen_device.value, stored)
    run.resolved("device", *chosen_device)
    run.resolved("dtype", *chosen_dtype)
    with run.timing("load"):
        loaded = load_model(found.directory, device=chosen_device.value, dtype=chosen_dtype.value)
    identity = ModelIdentity(id=found.id, revision=found.revision, source=found.source)
    return identity, loaded, Where(chosen_device.value, chosen_dtype.value)
