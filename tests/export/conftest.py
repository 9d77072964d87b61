"""Directories in both containers of integers, as `quantize` writes them: what export must give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.engines import shards
from tests.battery import BATTERY
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]
CONTAINERS = ("gptq", "compressed-tensors")
# What is not the same in a directory that was exported there and back, or written at once.
REPORT = "loftq_report.json"
# Widths and blocks; and in several files, as a model of any size is.
CASES = {
    "4 bits": ("--bits", 4),
    "mixed widths": ("--bits", "8x1,2", "--block-size", 32),
    "whole rows": ("--bits", 3, "--block-size", -1),
}


def other(container: str) -> str:
    return next(name for name in CONTAINERS if name != container)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the report, by its name."""
    found = {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }
    del found[REPORT]
    return found


def report_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / REPORT).read_text())
    return found


@dataclass(frozen=True)
class Directories:
    """What `quantize` wrote with the same settings in each container, every one called OUT."""

    source: Path
    written: Mapping[str, Path]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "llama"
    BATTERY["llama"].build(dtype=torch.bfloat16).save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text("{}")
    (directory / "2_Normalize").mkdir()
    return directory


@contextmanager
def small_files() -> Iterator[None]:
    """Several weight files, for what is quantized inside; nothing of it outlives that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 20_000)
        yield


@pytest.fixture(scope="session", params=CASES)
def directories(
    request: pytest.FixtureRequest,
    loftq: Loftq,
    source: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Directories:
    place = tmp_path_factory.mktemp("written")
    written = {container: place / container / "OUT" for container in CONTAINERS}
    for container, out in written.items():
        with small_files():
            done = loftq("quantize", "-m", source, "-o", out, "--container", container, "--rank", 4,
                         "--iterations", 1, *CASES[request.param])  # fmt: skip
        assert done.code == 0, done.err
    return Directories(source, written)


@pytest.fixture(scope="session")
def original(loftq: Loftq, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of them, for those who only look."""
    out = tmp_path_factory.mktemp("original") / "OUT"
    with small_files():
        done = loftq("quantize", "-m", source, "-o", out, "--container", "gptq", "--rank", 4,
                     "--iterations", 1)  # fmt: skip
    assert done.code == 0, done.err
    return out


@pytest.fixture
def written(original: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(original, tmp_path / "written"))
