"""A hub repository's config and safetensors headers, by range requests: no weight is downloaded.
What is behind the headers can be read in the same way (see `hub_files.py`).

    GET config.json                          small, whole; its answer says which commit it is of
    GET model.safetensors, bytes 0-7         how long the header is
    GET model.safetensors, bytes 8-(7+N)     the header

or, where there is no such file, model.safetensors.index.json and then the two ranges of every
shard, a few at a time. Endpoint, token and proxies are those of huggingface_hub. Nothing is written
to the cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from loftq_cli.checkpoint.files import corrupt
from loftq_cli.checkpoint.index import (
    INDEX_FILE,
    MAX_CONFIG_BYTES,
    SINGLE_FILE,
    Checkpoint,
    checkpoint_of,
    parse_json,
    weight_map_of,
)
from loftq_cli.checkpoint.safetensors import (
    MAX_HEADER_BYTES,
    Header,
    header_length,
    parse_header,
)
from loftq_cli.errors import LoftqError, ModelNotFound, UnsafeCheckpoint, first_line
from loftq_cli.models.hub_files import HubFile, Patience, answered, said
from loftq_cli.models.source import CONFIG_FILE, check_values, refuse_quantized

CONNECTIONS = 8
# Whoever looks at headers waits for an answer, and not for a hub that is away.
_TRIES = 1


class RemoteModel(NamedTuple):
    """What a repository says about its model at one commit."""

    commit: str | None
    config: dict[str, Any]
    checkpoint: Checkpoint


def read_remote(repository: str, revision: str | None, *, tries: int = _TRIES) -> RemoteModel:
    """Config and headers of a hub repository.

    Args:
        tries: how often something is asked again that the network failed.

    Raises:
        ModelNotFound: no such repository or revision, no access, no network, or no safetensors.
        UnsafeCheckpoint: the weights are there as pickle only, or the index leads elsewhere.
        CorruptCheckpoint: a file is no such file.
        AlreadyQuantized: the config says so.
    """
    hub = _Repository(repository, revision, tries)
    path = Path(repository)
    config = parse_json(hub.require(CONFIG_FILE, MAX_CONFIG_BYTES), path / CONFIG_FILE)
    check_values(config, path / CONFIG_FILE)
    refuse_quantized(path, config)
    single = hub.header(SINGLE_FILE)
    if single is not None:
        return RemoteModel(hub.commit, config, checkpoint_of(path, {SINGLE_FILE: single}))
    index = hub.get(INDEX_FILE, 0, MAX_HEADER_BYTES)
    if index is None:
        raise hub.without_safetensors()
    weight_map = weight_map_of(parse_json(index.body, path / INDEX_FILE), path / INDEX_FILE)
    files = sorted(set(weight_map.values()))
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        headers = dict(zip(files, pool.map(hub.required_header, files), strict=True))
    return RemoteModel(hub.commit, config, checkpoint_of(path, headers, weight_map))


class _Answer(NamedTuple):
    body: bytes
    file_bytes: int | None  # of the whole file, where the answer said so
    etag: str | None


class _Repository:
    """One repository at one revision; after the first answer, at the commit that it named."""

    def __init__(self, repository: str, revision: str | None, tries: int) -> None:
        self.repository = repository
        self.revision = revision
        self._tries = tries
        self.commit: str | None = None

    def require(self, name: str, limit: int) -> bytes:
        answer = self.get(name, 0, limit)
        if answer is None:
            raise ModelNotFound(
                f"'{self.repository}' has no {name}",
                cause="nothing says which architecture its weights belong to",
                hint="name a repository that holds a model, not only an adapter or a dataset",
            )
        return answer.body

    def header(self, name: str) -> Header | None:
        """The header of a safetensors file; None if there is no such file."""
        head = self.get(name, 0, 8)
        if head is None:
            return None
        place = Path(self.repository) / name
        end = header_length(head.body, head.file_bytes, place)
        rest = self.get(name, 8, end - 8)
        if rest is None:
            raise corrupt(place, "it was deleted while it was read")
        if rest.etag != head.etag:
            raise corrupt(place, "it changed while it was read", "run the same line again")
        header = parse_header(head.body + rest.body, head.file_bytes, place)
        return replace(header, source=self._file(name, header.file_bytes, head.etag))

    def _file(self, name: str, file_bytes: int, etag: str | None) -> HubFile:
        from huggingface_hub import constants

        commit = self.commit or self.revision or constants.DEFAULT_REVISION
        return HubFile(constants.ENDPOINT, self.repository, commit, name, file_bytes, etag)

    def required_header(self, name: str) -> Header:
        header = self.header(name)
        if header is None:
            raise corrupt(Path(self.repository) / name, f"{INDEX_FILE} names it, and it is missing")
        return header

    def get(self, name: str, start: int, length: int) -> _Answer | None:
        """At most ``length`` bytes of a file from ``start`` on; None if there is no such file."""
        from huggingface_hub import errors

        patience = Patience(self._tries, self.unreachable)
        while True:
            try:
                return self._asked(name, start, length)
            except errors.EntryNotFoundError:
                return None
            except Exception as error:  # of the HTTP library, whose types are none of ours
                patience.after(error)

    def _asked(self, name: str, start: int, length: int) -> _Answer:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.repository, name, revision=self.commit or self.revision)
        with answered(url, start, start + length, retries=self._tries) as response:
            # A server that knows no ranges answers 200 and sends the file from its beginning.
            skip = 0 if response.status_code == 206 else start
            body = _first(response.iter_bytes(), skip + length)[skip:]
            found = said(response)
        if found.file_bytes is not None and len(body) < min(length, found.file_bytes - start):
            raise EOFError("the answer ends before what was asked for")
        self.commit = self.commit or found.commit
        return _Answer(body, found.file_bytes, found.etag)

    def unreachable(self, error: Exception) -> ModelNotFound:
        from huggingface_hub import errors

        spec = self.repository if self.revision is None else f"{self.repository}@{self.revision}"
        if isinstance(error, errors.GatedRepoError):
            return ModelNotFound(
                f"no access to '{spec}'",
                cause="its owner wants a licence accepted first",
                hint="accept it on the model's page, then log in with `hf auth login` or HF_TOKEN",
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return ModelNotFound(
                f"'{self.repository}' has no revision '{self.revision}'",
                cause="no branch, tag or commit of this name is there",
                hint=f"--model {self.repository}",
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return ModelNotFound(
                f"no model '{spec}' on the hub",
                cause="there is none of this name, or it is private",
                hint="check the spelling; a private one needs `hf auth login` or HF_TOKEN",
            )
        return ModelNotFound(
            f"the hub did not answer about '{spec}'",
            cause=first_line(error),
            hint="--model demo and local directories need no network; HF_ENDPOINT names another "
            "hub, HF_HUB_OFFLINE=1 keeps to the cache and the models that loftq knows",
        )

    def without_safetensors(self) -> LoftqError:
        if self.get("pytorch_model.bin", 0, 1) or self.get("pytorch_model.bin.index.json", 0, 1):
            return UnsafeCheckpoint(
                f"'{self.repository}' offers its weights as pickle only",
                cause="a pickle has no header that could be read without running what is in it",
                hint="look for a revision with safetensors (--model ID@refs/pr/N), or convert a "
                "copy that you trust with transformers' save_pretrained",
            )
        return ModelNotFound(
            f"'{self.repository}' has no {SINGLE_FILE}",
            cause="nor has it an index of shards",
            hint="name a repository that holds a model's weights as safetensors",
        )


def _first(chunks: Iterable[bytes], length: int) -> bytes:
    """The first bytes of a stream, which is read no further than that."""
    body = bytearray()
    for chunk in chunks:
        body += chunk
        if len(body) >= length:
            break
    return bytes(body[:length])
