"""The weights that a directory was made from, if they are on this disk. Nothing is downloaded."""

from __future__ import annotations

from loftq_cli.errors import LoftqError, ModelNotFound
from loftq_cli.models.hub_cache import cached_model
from loftq_cli.models.spec import ResolvedModel, hub_id, local_model


def required_source(spec: str) -> ResolvedModel:
    """The model that the user named: built in, a directory, or in the hub's cache.

    Raises:
        ModelNotFound: it is not on this disk.
        UsageError: it is no name of a model.
    """
    found = local_model(spec) or cached_model(*hub_id(spec))
    if found is None:
        raise ModelNotFound(
            f"'{spec}' is not on this disk",
            cause="it is no directory, and the hub's cache does not have all of it; verify "
            "downloads nothing",
            hint=f"hf download {spec.replace('@', ' --revision ')}",
        )
    return found


def reported_source(spec: str, revision: str | None, *, is_hub_id: bool) -> ResolvedModel | None:
    """The model that a report names; None if it is not at hand, for whatever reason."""
    try:
        return cached_model(hub_id(spec)[0], revision) if is_hub_id else local_model(spec)
    except LoftqError:
        return None
