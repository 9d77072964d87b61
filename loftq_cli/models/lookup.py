"""From what a person types after ``--model`` to an outline, without reading a weight.

The first of these that has the model answers:

1. the built-in model, or a local directory
2. the hub's cache, where the model's files are all there
3. the shipped table: at once and without a network, so it comes before the hub
4. the hub, which is asked for config.json and the headers of the weight files

A revision is always looked for among files: the table describes what is published, not a commit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loftq_cli.checkpoint.index import Checkpoint, open_checkpoint
from loftq_cli.errors import ModelNotFound
from loftq_cli.models.known import known_model, similar_names
from loftq_cli.models.outline import Outline, outline_of
from loftq_cli.models.source import read_config, refuse_quantized
from loftq_cli.models.spec import (
    ResolvedModel,
    cached_model,
    hub_id,
    is_offline,
    local_model,
    resolve_model,
)
from loftq_cli.schema import ModelIdentity


@dataclass(frozen=True)
class FoundModel:
    """An outline and where it came from.

    ``checkpoint`` has the headers and ``config`` is config.json; the shipped table has neither.
    Only files that are on this disk can be read behind the headers.
    """

    identity: ModelIdentity
    reason: str
    outline: Outline
    checkpoint: Checkpoint | None = None
    config: dict[str, Any] | None = None


def find_model(spec: str, note: Callable[[str], None], *, with_headers: bool = False) -> FoundModel:
    """The outline of ``spec``; ``note`` is told before the network is used.

    ``with_headers`` passes over the shipped table, which does not know a file's dtypes.

    Raises:
        ModelNotFound: nobody knows this model, or nobody who can be reached.
        AlreadyQuantized: its weights are no longer those of the original.
        UsageError, UnsafeCheckpoint, CorruptCheckpoint: see `spec` and `remote`.
    """
    here = local_model(spec)
    if here is not None:
        reason = (
            "the built-in model" if here.identity.source == "demo" else "a directory on this disk"
        )
        return _from_files(here, reason)
    repository, revision = hub_id(spec)
    cached = cached_model(repository, revision)
    if cached is not None:
        return _from_files(cached, "the files are in the hub's cache")
    known = None if revision or with_headers else known_model(repository)
    if known is not None:
        what, outline = known
        identity = ModelIdentity(id=repository, source="known")
        return FoundModel(identity, f"{what}, from the shipped table", outline)
    if is_offline():
        raise _offline(spec, with_headers)
    note(f"asking the hub about {spec}: config and headers only")
    from loftq_cli.models.remote import read_remote

    remote = read_remote(repository, revision)
    outline = outline_of(remote.checkpoint.infos, remote.config)
    reason = "config and headers from the hub, by range requests"
    identity = ModelIdentity(id=repository, revision=remote.commit or revision, source="hub")
    return FoundModel(identity, reason, outline, remote.checkpoint, remote.config)


def fetch_model(spec: str) -> FoundModel:
    """The same with the weights at hand, downloaded if they have to be.

    Raises:
        ModelNotFound: as above; for a model of the table, saying what can be had without weights.
    """
    try:
        return _from_files(resolve_model(spec), "its weights are read")
    except ModelNotFound as error:
        if known_model(spec) is None:
            raise
        raise ModelNotFound(
            f"there are no weights of '{spec}' here to measure",
            cause=error.cause,
            hint="leave --error out: parameters and memory need no weights; or download the model "
            f"first (hf download {spec}), or measure --model demo",
        ) from error


def _from_files(found: ResolvedModel, reason: str) -> FoundModel:
    config = read_config(found.directory)
    refuse_quantized(found.directory, config)
    checkpoint = open_checkpoint(found.directory)
    outline = outline_of(checkpoint.infos, config)
    return FoundModel(found.identity, reason, outline, checkpoint, config)


def _offline(spec: str, with_headers: bool) -> ModelNotFound:
    forbidden = "and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network"
    others = "a local directory, or unset the variable to ask the hub"
    if with_headers:
        return ModelNotFound(
            f"the files of '{spec}' are not here",
            cause=f"the hub's cache does not have all of them, {forbidden}",
            hint=f"--model demo, {others}",
        )
    near = similar_names(spec)
    return ModelNotFound(
        f"'{spec}' is not known without its files",
        cause=f"it is neither in the hub's cache nor in the shipped table, {forbidden}",
        hint=f"--model {near[0] if near else 'demo, gpt2 or llama'}, {others}",
    )
