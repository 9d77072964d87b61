"""From what a person types after ``--model`` to a directory of files.

demo                   the built-in model
./dir  ~/dir  dir      a local directory (a name that looks like a path never goes to a hub)
org/name, name         a hub id, from the cache or the hub; ``id@revision`` pins a revision
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from loftq_cli.checkpoint.index import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    open_checkpoint,
    read_index,
)
from loftq_cli.errors import LoftqError, ModelNotFound, UnsafeCheckpoint, UsageError, first_line
from loftq_cli.models.companions import TOKENIZER, LeftOut, wanted
from loftq_cli.models.source import CONFIG_FILE, PICKLE_SUFFIXES
from loftq_cli.schema import ModelIdentity

DEMO_DIRECTORY = Path(__file__).parent.parent / "demo"

_LONGEST_NAME = 4096  # no path is longer either
_TRUE = {"1", "ON", "YES", "TRUE"}
# What is downloaded of a repository; the description is config and tokenizer.
_Parts = Literal["model", "all but weights", "description"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ResolvedModel:
    """A model whose files are on this disk; ``not_fetched`` is what its repository has more.

    Of one that is streamed the weights are not: they are what ``streamed`` reads from a hub.
    """

    identity: ModelIdentity
    directory: Path
    not_fetched: tuple[LeftOut, ...] = ()
    streamed: Checkpoint | None = None

    def checkpoint(self) -> Checkpoint:
        """The weights, by headers that are read now, or were when the model was found.

        Raises:
            LoftqError: see `open_checkpoint`.
        """
        return open_checkpoint(self.directory) if self.streamed is None else self.streamed


def resolve_model(
    spec: str, *, with_code: bool = False, with_weights: bool = True
) -> ResolvedModel:
    """The files behind ``spec``, downloaded if they have to be.

    ``with_code`` also fetches the repository's Python files; only ``--trust-remote-code`` asks
    for that. Without ``with_weights`` config and tokenizer will do.

    Raises:
        ModelNotFound: there is no such directory, repository or revision, or no way to reach it.
        UnsafeCheckpoint: the repository offers its weights as pickle only.
        UsageError: the name is neither a path nor a hub id.
    """
    what: _Parts = "model" if with_weights else "description"
    return local_model(spec) or _from_hub(*hub_id(spec), with_code, what)


def stream_model(spec: str, *, with_code: bool = False) -> ResolvedModel:
    """A hub's model whose weights are read from there, at one commit; what is small is downloaded.

    Raises:
        UsageError: the model is on this disk, or the name is no hub id.
        ModelNotFound: there is no such repository or revision, or no way to reach it.
        UnsafeCheckpoint: the repository offers its weights as pickle only.
        CorruptCheckpoint: a weight file is no such file.
    """
    from loftq_cli.models.hub_files import TRIES
    from loftq_cli.models.remote import read_remote

    repository, revision = streamable(spec)
    if is_offline():
        raise ModelNotFound(
            f"'{spec}' cannot be streamed",
            cause="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network",
            hint="unset it, or leave --stream out to read what the hub's cache has",
        )
    found = _from_hub(repository, revision, with_code, "all but weights")
    remote = read_remote(repository, found.identity.revision, tries=TRIES)
    return replace(found, streamed=remote.checkpoint)


def streamable(spec: str) -> tuple[str, str | None]:
    """The repository and revision of a model that is on a hub and not on this disk.

    Raises:
        UsageError: it is on this disk, or the name is no hub id.
        ModelNotFound: the name is a path, and there is no directory.
    """
    here = local_model(spec)
    if here is not None:
        what = "the built-in model" if here.identity.source == "demo" else "a directory here"
        raise UsageError(
            f"'{spec}' is {what}: nothing to stream",
            cause="--stream reads the weights of a hub's repository",
            hint="leave --stream out, or give a hub id such as org/name",
        )
    return hub_id(spec)


def local_model(spec: str) -> ResolvedModel | None:
    """The built-in model or a local directory; None if ``spec`` may be a hub id.

    Raises:
        ModelNotFound: the name is a path, and there is no directory.
        UsageError: the name is that of a file.
    """
    if spec == "demo":
        return ResolvedModel(ModelIdentity(id="demo", source="demo"), DEMO_DIRECTORY)
    if not spec or len(spec) > _LONGEST_NAME:
        raise UsageError(
            "the model has no name" if not spec else f"no model has a name of {len(spec)} letters",
            hint="--model demo, a directory, or a hub id such as org/name",
        )
    try:
        directory = Path(spec).expanduser()
        found = directory.stat() if directory.exists() else None
    except (OSError, RuntimeError) as error:  # a name that is too long, or ~ of nobody
        raise ModelNotFound(
            f"no model at '{spec:.200}'",
            cause=getattr(error, "strerror", None) or str(error),
            hint="--model demo works everywhere; otherwise give a directory or a hub id (org/name)",
        ) from None
    if found is not None and stat.S_ISDIR(found.st_mode):
        return ResolvedModel(ModelIdentity(id=spec, source="directory"), directory)
    if found is not None:
        raise UsageError(
            f"'{spec}' is a file",
            cause="a model is a directory: its config and tokenizer are needed too",
            hint=f"--model {directory.parent}",
        )
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise ModelNotFound(
            f"no model at '{spec}'",
            cause="the directory does not exist",
            hint="--model demo works everywhere; otherwise give a directory or a hub id (org/name)",
        )
    return None


def hub_id(spec: str) -> tuple[str, str | None]:
    """`org/name@revision` as (org/name, revision).

    Raises:
        UsageError: it is no hub id.
    """
    repository, _, revision = spec.partition("@")
    if not _HUB_ID.fullmatch(repository) or "@" in revision or spec.endswith("@"):
        raise UsageError(
            f"'{spec}' is not a model",
            cause="it is neither 'demo', nor a directory, nor a hub id such as org/name@revision",
        )
    return repository, revision or None


def is_offline() -> bool:
    """Whether the environment forbids the network, by the rules of huggingface_hub."""
    asked = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return asked.upper() in _TRUE


def cached_model(repository: str, revision: str | None) -> ResolvedModel | None:
    """The cached files of a model; None unless its config and all its weights are among them.

    huggingface_hub is not imported for this. Its cache is laid out so:

        HF_HUB_CACHE/models--org--name/refs/REVISION          holds a commit
                                      /snapshots/COMMIT/...   the files of that commit
    """
    wanted = revision or "main"
    if ".." in Path(wanted).parts or Path(wanted).is_absolute():
        return None
    folder = cache_directory() / f"models--{repository.replace('/', '--')}"
    try:
        commit = (folder / "refs" / wanted).read_text("ascii").strip()
    except (OSError, ValueError):  # a null byte, or a name that is no text
        commit = wanted  # a commit needs no ref
    snapshot = folder / "snapshots" / commit
    if not _is_complete(snapshot):
        return None
    return ResolvedModel(
        ModelIdentity(id=repository, revision=snapshot.name, source="hub"), snapshot
    )


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


def _from_hub(
    repository: str, revision: str | None, with_code: bool, what: _Parts
) -> ResolvedModel:
    """Downloads what is copied later, and exactly the weight files that the index names."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    with_weights = what == "model"

    def fetch(names: list[str]) -> Path:
        # They are taken for patterns, in which only a bracket needs escaping: no name has a star.
        patterns = [name.replace("[", "[[]") for name in names]
        found = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=patterns,
            local_files_only=unlisted is not None,
        )
        return Path(found)

    sizes: dict[str, int] = {}
    unlisted: Exception | None = None
    try:
        sizes = _files_of(repository, revision)
    except Exception as error:  # any of the network's
        if what == "all but weights":  # without the hub, nothing can be done about those
            raise _unavailable(repository, revision, error) from error
        # Then what is cached has to do: without the list a download would be in part.
        unlisted = error
    try:
        names, left = wanted(sizes, with_code=with_code)
        if what == "description":
            described = (*TOKENIZER, "*.py")
            names = [name for name in names if any(fnmatch(name, each) for each in described)]
        directory = fetch([CONFIG_FILE, INDEX_FILE, *names])
        if with_weights:
            # Names from an index become patterns of what is downloaded, so it is checked first.
            indexed = (directory / INDEX_FILE).exists()
            directory = fetch(
                sorted({*read_index(directory).values()}) if indexed else [SINGLE_FILE]
            )
    except (HFValidationError, OSError) as error:  # most errors of the hub are OSErrors
        raise _unavailable(repository, revision, unlisted or error) from error
    if with_weights and not any(directory.glob("*.safetensors")):
        _refuse_pickle_repository(repository, revision)
    identity = ModelIdentity(id=repository, revision=directory.name, source="hub")
    return ResolvedModel(identity, directory, tuple(left))


def _unavailable(repository: str, revision: str | None, error: Exception) -> ModelNotFound:
    spec = repository if revision is None else f"{repository}@{revision}"
    return ModelNotFound(
        f"no model '{spec}'",
        cause=first_line(error),
        hint="--model demo needs no network; a directory of yours works too. Downloads go "
        "through HF_ENDPOINT and HF_TOKEN into HF_HOME; with HF_HUB_OFFLINE=1 only what "
        "is cached there is found",
    )


def _files_of(repository: str, revision: str | None) -> dict[str, int]:
    """The bytes of each file of a repository."""
    from huggingface_hub import HfApi

    entries = HfApi().list_repo_tree(repository, revision=revision, recursive=True)
    return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}


def _refuse_pickle_repository(repository: str, revision: str | None) -> None:
    from huggingface_hub import HfApi

    names: list[str] = []
    with suppress(OSError):  # as most errors of the hub are
        names = HfApi().list_repo_files(repository, revision=revision)
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise UnsafeCheckpoint(
            f"'{repository}' offers its weights as pickle only ({', '.join(pickles[:3])})",
            cause="opening a pickle runs whatever code it contains",
            hint="look for a revision with safetensors (--model ID@refs/pr/N), or convert a copy "
            "that you trust with transformers' save_pretrained",
        )
    raise ModelNotFound(
        f"'{repository}' has no model.safetensors",
        cause="neither that file nor an index of its shards is in the repository or the cache",
        hint="the file may not be cached: unset HF_HUB_OFFLINE, or name another repository",
    )
