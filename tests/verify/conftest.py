"""A small written directory, and ways to damage it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.checkpoint.safetensors import read_header
from tests.battery import BATTERY
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]
# One layer of a small Llama: square, so that A and B can be taken for each other.
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def originals(loftq: Loftq, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model and what `quantize` makes of it, once: `source` and `written` are copies."""
    directory = tmp_path_factory.mktemp("originals")
    BATTERY["llama"].build(dtype=torch.bfloat16).save_pretrained(directory / "source")
    outcome = loftq("quantize", "-m", directory / "source", "-o", directory / "out",
                    "--rank", 8, "--iterations", 1)  # fmt: skip
    assert outcome.code == 0, outcome.err
    return directory


@pytest.fixture
def source(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "source", tmp_path / "source"))


@pytest.fixture
def written(originals: Path, source: Path, tmp_path: Path) -> Path:
    """An intact output of `quantize`, whose report names this `source`."""
    out = Path(shutil.copytree(originals / "out", tmp_path / "out"))
    report = out / "loftq_report.json"
    report.write_text(report.read_text().replace(str(originals), str(source.parent)))
    return out


_OPENED: list[str] = []
_WATCHING: list[bool] = []


@pytest.fixture
def opened() -> list[str]:
    """The paths of all files that are opened, by whoever does it."""
    if not _WATCHING:
        # A hook can never be taken away again, so there is one for all tests.
        sys.addaudithook(lambda event, args: _note(args[0]) if event == "open" else None)
        _WATCHING.append(True)
    _OPENED.clear()
    return _OPENED


def _note(path: object) -> None:
    if isinstance(path, str | bytes):
        _OPENED.append(os.fsdecode(path))


def run_verify(loftq: Loftq, *argv: object) -> tuple[Outcome, dict[str, Any]]:
    """`verify --json`: how it ended, and the results, which are there whenever it got to work."""
    outcome = loftq("verify", "--json", *argv)
    assert "Traceback" not in outcome.err
    return outcome, json.loads(outcome.out)["results"] if outcome.out else {}


def statuses(results: dict[str, Any]) -> dict[str, str]:
    return {test["name"]: test["status"] for test in results["tests"]}


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_report(directory: Path, change: Callable[[Any], None]) -> None:
    """Changes the `results` of the directory's report."""
    edit_json(directory / "loftq_report.json", lambda report: change(report["results"]))


def reseal(directory: Path) -> None:
    """Makes the report's sizes and hashes those of the files, whatever they are now."""

    def change(results: Any) -> None:
        for file in results["files"]:
            content = (directory / file["name"]).read_bytes()
            file |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    edit_report(directory, change)


def overwrite(path: Path, tensor: str, change: Callable[[bytearray], None]) -> None:
    """Changes the bytes of one tensor in a safetensors file, in place."""
    info = read_header(path).tensors[tensor]
    content = bytearray(path.read_bytes())
    piece = content[info.start : info.end]
    change(piece)
    assert len(piece) == info.nbytes
    content[info.start : info.end] = piece
    path.write_bytes(content)
