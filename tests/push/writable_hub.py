"""A hub on loopback that repositories are made in and written to, as huggingface_hub 2.4 does it.

    POST /api/repos/create                  a repository, with the `.gitattributes` of the real one
    POST /api/validate-yaml                 the front matter of a README
    POST /api/models/ID/preupload/main      which files go as LFS, and what is there already
    POST /ID.git/info/lfs/objects/batch     where to put those; nothing of what has arrived before
    PUT  /blobs/OID                         one of them, held against its SHA-256
    POST /api/models/ID/commit/main         all of it becomes visible at once

What is there is read as from any stand-in: listed, looked up and downloaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.models.stand_in_hub import RemoteFile, StandInHub, handler_of, running

TOKEN = "hf_of_nobody_at_all_0123456789"
# What the real one takes as metadata; the rest of a card is free.
TASKS = {"text-generation", "text-classification", "fill-mask"}
RELATIONS = {"quantized", "adapter", "finetune", "merge"}


@dataclass
class Kept:
    """What the hub knows of a repository beside its files."""

    private: bool
    head: str


@dataclass
class WritableHub(StandInHub):
    namespaces: set[str] = field(default_factory=lambda: {"me"})
    repositories: dict[str, Kept] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    arrived: list[str] = field(default_factory=list)  # LFS objects, by every PUT that succeeded
    puts_left: int | None = None  # then the disk there is full

    def create(self, repository: str, *, private: bool = False) -> None:
        self.repositories[repository] = Kept(private, "")
        self.write(repository, {".gitattributes": b"*.safetensors filter=lfs\n"})

    def write(self, repository: str, files: dict[str, bytes]) -> None:
        """A commit."""
        for name, content in files.items():
            self.files[f"{repository}/{name}"] = RemoteFile(content)
        self._advance(repository)

    def delete(self, repository: str, name: str) -> None:
        del self.files[f"{repository}/{name}"]
        self._advance(repository)

    def commit_of(self, repository: str) -> str:
        kept = self.repositories.get(repository)
        return super().commit_of(repository) if kept is None else kept.head

    def contents(self, repository: str) -> dict[str, bytes]:
        return {
            name.removeprefix(f"{repository}/"): file.beginning
            for name, file in self.files.items()
            if name.startswith(f"{repository}/")
        }

    def _advance(self, repository: str) -> None:
        everything = repr(sorted(self.contents(repository).items())).encode()
        self.repositories[repository].head = hashlib.sha1(everything).hexdigest()


@contextmanager
def running_writable(hub: WritableHub) -> Iterator[WritableHub]:
    with running(hub, _handler(hub)):
        yield hub


def _is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _wrong_in(card: str) -> list[str]:
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    data = yaml.safe_load(found[1]) if found else None
    if not isinstance(data, dict):
        return ["there is no metadata"]
    wrong = []
    if data.get("base_model_relation", "quantized") not in RELATIONS:
        wrong.append('"base_model_relation" is none of them')
    if data.get("pipeline_tag", "fill-mask") not in TASKS:
        wrong.append('"pipeline_tag" is no task')
    if "license" in data and not re.fullmatch(r"[a-z0-9.+-]+", str(data["license"])):
        wrong.append('"license" must be one of the list')
    return wrong


def _handler(hub: WritableHub) -> Any:
    class Handler(handler_of(hub)):  # type: ignore[misc]
        def listing(self, repository: str, what: str) -> None:
            kept = hub.repositories.get(repository)
            if kept is None:
                super().listing(repository, what)
                return
            found: Any = {
                "id": repository,
                "sha": kept.head,
                "private": kept.private,
                "siblings": [{"rfilename": name} for name in hub.contents(repository)],
            }
            if what.startswith("/tree/"):
                found = [
                    {"type": "file", "path": name, "size": len(content), "oid": _git_hash(content)}
                    for name, content in hub.contents(repository).items()
                ]
            self.say(200, found)

        def say(self, status: int, content: Any, **headers: str) -> None:
            body = json.dumps(content).encode()
            self.answer(status, {"Content-Type": "application/json", **headers}, body)

        def body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return bytes(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def do_POST(self) -> None:
            body, path = self.body(), self.path.split("?")[0]
            if path == "/api/validate-yaml":  # anyone may ask
                wrong = _wrong_in(json.loads(body)["content"])
                said = [{"message": each} for each in wrong]
                self.say(400 if wrong else 200, {"errors": said, "warnings": []})
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                why = "Invalid credentials in Authorization header"
                self.say(401, {}, **{"X-Error-Message": why})
            elif path == "/api/repos/create":
                self.create(json.loads(body))
            elif match := re.fullmatch(r"/api/models/(.+)/(preupload|commit)/main", path):
                getattr(self, match[2])(match[1], body)
            elif match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
                self.batch(json.loads(body))
            else:
                self.say(404, {})

        def create(self, asked: dict[str, Any]) -> None:
            repository = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] not in hub.namespaces:
                self.say(403, {"error": "You don't have the rights"})
            elif repository in hub.repositories:
                self.say(409, {"error": "You already created this model repo"})
            else:
                hub.create(repository, private=asked.get("visibility") == "private")
                self.say(200, {"url": f"{hub.endpoint}/{repository}", "name": repository})

        def preupload(self, repository: str, body: bytes) -> None:
            if repository.partition("/")[0] not in hub.namespaces:
                self.say(403, {"error": "Forbidden"})
                return
            there = hub.contents(repository)
            files = []
            for each in json.loads(body)["files"]:
                large = _is_large(each["path"])
                now = there.get(each["path"])
                oid = None if now is None else _git_hash(now)
                if now is not None and large:
                    oid = hashlib.sha256(now).hexdigest()
                mode = "lfs" if large else "regular"
                files.append(
                    {"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
                )
            self.say(200, {"files": files})

        def batch(self, asked: dict[str, Any]) -> None:
            objects = []
            for each in asked["objects"]:
                upload = {"href": f"{hub.endpoint}/blobs/{each['oid']}"}
                known = each["oid"] in hub.blobs
                objects.append(each if known else {**each, "actions": {"upload": upload}})
            self.say(200, {"transfer": "basic", "objects": objects})

        def do_PUT(self) -> None:
            body, oid = self.body(), self.path.rpartition("/")[2]
            if hub.puts_left == 0:
                self.say(507, {"error": "Insufficient storage"})
            elif hashlib.sha256(body).hexdigest() != oid:
                self.say(400, {"error": "this is another file"})
            else:
                hub.puts_left = None if hub.puts_left is None else hub.puts_left - 1
                hub.blobs[oid] = body
                hub.arrived.append(oid)
                self.say(200, {})

        def commit(self, repository: str, body: bytes) -> None:
            header, *operations = (json.loads(line) for line in body.splitlines())
            parent = header["value"].get("parentCommit")
            if parent != hub.repositories[repository].head:
                self.say(412, {"error": "A commit has happened since."})
                return
            added = {}
            for each in operations:
                value = each["value"]
                if each["key"] == "file":
                    added[value["path"]] = base64.b64decode(value["content"])
                elif each["key"] == "lfsFile":
                    added[value["path"]] = hub.blobs[value["oid"]]
                else:
                    hub.delete(repository, value["path"])
            hub.write(repository, added)
            oid = hub.repositories[repository].head
            url = f"{hub.endpoint}/{repository}/commit/{oid}"
            self.say(200, {"commitUrl": url, "commitOid": oid})

    return Handler
