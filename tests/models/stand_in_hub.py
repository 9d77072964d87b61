"""A hub on loopback that counts what it serves; what has only a header serves no more than that.

It lists a repository's files too, so huggingface_hub's `snapshot_download` works with it. By hand,
until it is stopped, with a directory's files as those of `org/model`:

    python -m tests.models.stand_in_hub DIRECTORY
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class RemoteFile:
    """A file of which only the beginning exists; whoever asks for more has asked for weights."""

    beginning: bytes | mmap.mmap
    total: int | None = None
    redirected: bool = False  # as the hub does with large files, to where the bytes are
    etag: str = ""

    def __post_init__(self) -> None:
        if not self.etag:
            self.etag = hashlib.sha1(self.beginning).hexdigest()

    @property
    def size(self) -> int:
        return len(self.beginning) if self.total is None else self.total


@dataclass
class Fault:
    """What is wrong with an answer: another status, a body that breaks off or is cut honestly."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    broken_after: int | None = None  # bytes, then the connection is closed
    shorter: int = 0  # bytes fewer than were asked for, and the headers say so


@dataclass
class Request:
    path: str
    range: str | None
    authorization: str | None
    status: int
    body_bytes: int


@dataclass
class StandInHub:
    """``files`` by "org/name/file"; ``requests`` as they came."""

    files: dict[str, RemoteFile] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    ignores_ranges: bool = False
    gated: set[str] = field(default_factory=set)
    endpoint: str = ""
    commit: str = COMMIT
    # What is wrong with the answer to a request for these bytes (first, last) of a file.
    fault: Callable[[str, int, int], Fault | None] = lambda name, first, last: None

    def add_model(
        self, repository: str, config: dict[str, Any], shards: dict[str, dict[str, Any]]
    ) -> int:
        """A model whose shards have these headers, and no data; returns the headers' bytes."""
        self.files[f"{repository}/config.json"] = RemoteFile(json.dumps(config).encode())
        weight_map = {name: shard for shard, header in shards.items() for name in header}
        if list(shards) != ["model.safetensors"]:
            index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
            self.files[f"{repository}/model.safetensors.index.json"] = RemoteFile(index)
        served = 0
        for shard, header in shards.items():
            text = json.dumps(header).encode()
            head = len(text).to_bytes(8, "little") + text
            data = max(entry["data_offsets"][1] for entry in header.values())
            self.files[f"{repository}/{shard}"] = RemoteFile(head, len(head) + data, True)
            served += len(head)
        return served

    def add_directory(self, repository: str, directory: Path) -> None:
        """A directory's files; the weights are sent on to where the bytes are."""
        for path in sorted(each for each in directory.rglob("*") if each.is_file()):
            name = f"{repository}/{path.relative_to(directory).as_posix()}"
            if path.suffix == ".safetensors":
                with path.open("rb") as file:
                    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                status = path.stat()
                etag = f"{status.st_size:x}-{status.st_mtime_ns:x}"
                self.files[name] = RemoteFile(content, redirected=True, etag=etag)
            else:
                self.files[name] = RemoteFile(path.read_bytes())

    def commit_of(self, repository: str) -> str:
        return self.commit

    def served(self, suffix: str) -> int:
        return sum(each.body_bytes for each in self.requests if each.path.endswith(suffix))


def talk_to(hub: StandInHub, patch: pytest.MonkeyPatch, home: Path, token: str) -> None:
    """huggingface_hub in this process talks to this hub, with this token and an empty cache."""
    from huggingface_hub import constants

    files = "/{repo_id}/resolve/{revision}/{filename}"
    settings: dict[str, Any] = {
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + files,
        "ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_DISABLE_XET": True,  # its protocol is that of a compiled library
        "HF_TOKEN_PATH": str(home / "no-token"),
    }
    for name, value in settings.items():
        patch.setattr(constants, name, value)
    patch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        patch.delenv(name, raising=False)
    patch.setenv("HF_HUB_CACHE", str(home / "hub"))
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setenv("HF_TOKEN", token)


def header_of(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, Any]:
    """The JSON of a safetensors header for 16-bit tensors of these shapes, one after the other."""
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + 2
        for size in shape:
            end = start + (end - start) * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    return header


@contextmanager
def running(
    hub: StandInHub, handler: type[BaseHTTPRequestHandler] | None = None
) -> Iterator[StandInHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler or handler_of(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def handler_of(hub: StandInHub) -> Any:
    """The class that answers with what is in the hub."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(self.path)
            match = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
            asked = re.fullmatch(
                r"/api/models/(.+?)(/revision/[^/]+|/tree/[^/]+)?", path.split("?")[0]
            )
            commit = hub.commit_of("" if match is None else match[1])
            if asked is not None:
                self.listing(asked[1], asked[2] or "")
            elif path.startswith("/where-the-bytes-are/"):
                name = path.removeprefix("/where-the-bytes-are/")
                self.file(name, {"ETag": '"of-the-bytes"'})
            elif match is None:
                self.answer(404, {"X-Error-Code": "RepoNotFound"})
            elif match[1] in hub.gated:
                self.answer(403, {"X-Error-Code": "GatedRepo"})
            elif not any(name.startswith(f"{match[1]}/") for name in hub.files):
                self.answer(404, {"X-Error-Code": "RepoNotFound"})
            elif match[2] not in ("main", commit):
                self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            elif (name := f"{match[1]}/{match[3]}") not in hub.files:
                self.answer(404, {"X-Error-Code": "EntryNotFound"})
            elif hub.files[name].redirected:
                self.answer(
                    302,
                    {
                        "Location": f"/where-the-bytes-are/{name}",
                        "X-Repo-Commit": commit,
                        "X-Linked-Etag": f'"{hub.files[name].etag}"',
                    },
                )
            else:
                etag = f'W/"{hub.files[name].etag}"'
                self.file(name, {"X-Repo-Commit": commit, "ETag": etag})

        def do_HEAD(self) -> None:
            match = re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", unquote(self.path))
            file = None if match is None else hub.files.get(f"{match[1]}/{match[2]}")
            self.send_response(404 if file is None else 200)
            if file is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            else:
                assert match is not None
                self.send_header("X-Repo-Commit", hub.commit_of(match[1]))
                self.send_header("ETag", f'"{file.etag}"')
                self.send_header("Content-Length", str(file.size))
            self.end_headers()

        def listing(self, repository: str, what: str) -> None:
            """What is in the repository, or at which commit it is."""
            files = {
                name.removeprefix(f"{repository}/"): file
                for name, file in hub.files.items()
                if name.startswith(f"{repository}/")
            }
            if not files:
                self.answer(404, {"X-Error-Code": "RepoNotFound"})
                return
            found: Any = {"id": repository, "sha": hub.commit_of(repository), "siblings": []}
            if what.startswith("/tree/"):
                found = [
                    {"type": "file", "path": name, "size": file.size, "oid": "0"}
                    for name, file in files.items()
                ]
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(found).encode())

        def file(self, name: str, headers: dict[str, str]) -> None:
            file = hub.files[name]
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked is None or hub.ignores_ranges:
                self.answer(200, headers, file.beginning, file.size)
                return
            first, last = int(asked[1]), min(int(asked[2]), file.size - 1)
            fault = hub.fault(name, first, last) or Fault()
            if fault.status is not None:
                self.answer(fault.status, fault.headers)
                return
            last -= fault.shorter
            assert last < len(file.beginning), "weights were asked for"
            extent = f"bytes {first}-{last}/{file.size}"
            body, length = memoryview(file.beginning)[first : last + 1], last + 1 - first
            headers = {"Content-Range": extent, **headers, **fault.headers}
            self.answer(206, headers, body[: fault.broken_after], length)

        def answer(
            self,
            status: int,
            headers: dict[str, str],
            body: bytes | memoryview | mmap.mmap = b"",
            length: int | None = None,
        ) -> None:
            hub.requests.append(
                Request(
                    unquote(self.path),
                    self.headers.get("Range"),
                    self.headers.get("Authorization"),
                    status,
                    len(body),
                )
            )
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            if length is not None and length > len(body):
                self.close_connection = True  # there is nothing to go on with
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return Handler


if __name__ == "__main__":
    with running(StandInHub()) as hub:
        hub.add_directory("org/model", Path(sys.argv[1]))
        print(f"HF_ENDPOINT={hub.endpoint}", flush=True)
        threading.Event().wait()
