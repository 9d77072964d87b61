"""The hub's cache on this disk, looked into without importing huggingface_hub.

HF_HUB_CACHE/models--org--name/refs/REVISION          holds a commit
                              /snapshots/COMMIT/...   the files of that commit
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from loftq_cli.checkpoint.index import SINGLE_FILE, read_index
from loftq_cli.errors import LoftqError
from loftq_cli.models.source import CONFIG_FILE
from loftq_cli.models.spec import ResolvedModel
from loftq_cli.schema import ModelIdentity

_TRUE = {"1", "ON", "YES", "TRUE"}


def is_offline() -> bool:
    """Whether the environment forbids the network, by the rules of huggingface_hub."""
    asked = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return asked.upper() in _TRUE


def cached_model(repository: str, revision: str | None) -> ResolvedModel | None:
    """The cached files of a model; None unless its config and all its weights are among them."""
    wanted = revision or "main"
    if ".." in Path(wanted).parts or Path(wanted).is_absolute():
        return None
    folder = cache_directory() / f"models--{repository.replace('/', '--')}"
    try:
        commit = (folder / "refs" / wanted).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        commit = wanted  # a commit needs no ref
    snapshot = folder / "snapshots" / commit
    if not _is_complete(snapshot):
        return None
    return ResolvedModel(ModelIdentity(id=repository, revision=commit, source="hub"), snapshot)


def cache_directory() -> Path:
    """Where the hub's cache is, by the environment variables of huggingface_hub."""
    home = os.environ.get("HF_HOME")
    if home is None:
        root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = f"{root}/huggingface"
    place = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(place or f"{home}/hub")).expanduser()


def _is_complete(snapshot: Path) -> bool:
    if not (snapshot / CONFIG_FILE).is_file():
        return False
    if (snapshot / SINGLE_FILE).is_file():
        return True
    with suppress(LoftqError):
        return all((snapshot / name).is_file() for name in {*read_index(snapshot).values()})
    return False
