"""A model of eight blocks, each a file of its own, and what one process makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli import quantize
from loftq_cli.checkpoint.staging import Staging
from loftq_cli.engines import shards, workers
from loftq_cli.record import Listener, Progress
from tests.forks import FORKS
from tests.quantize.test_killed import contents

OPTIONS = {"rank": 4, "iterations": 1, "double_quant": True, "device": "cpu"}
LINE = ("--rank", 4, "--iterations", 1, "--double-quant", "--device", "cpu")


@pytest.fixture(scope="module", autouse=True)
def file_per_block() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 10_000)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("engines") / "source"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=8,
                         num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes, as `contents` has it."""
    out = tmp_path_factory.mktemp("expected") / "out"  # the README says the directory's name
    quantize(str(source), output=out, **OPTIONS)  # type: ignore[arg-type]
    found = contents(out)
    assert sum(name.startswith("model-") for name in found) == 9
    return found


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers begin where one that has imported everything stands, instead of anew."""
    monkeypatch.setattr(workers, "_SPAWN", FORKS)


class Watching(Listener):
    """Keeps what it is told; `at` is called when ten layers are done."""

    def __init__(self, at: Callable[[], None] = lambda: None) -> None:
        self.notes: list[str] = []
        self.done: list[str] = []
        self.at = at

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Progress]:
        told = Progress()
        told.advance = self._advance  # type: ignore[method-assign]
        yield told
        assert len(self.done) == total

    def _advance(self, name: str = "") -> None:
        self.done.append(name)
        if len(self.done) == 10:
            self.at()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    real = Staging.record

    def record(self: Staging, name: str, *rest: Any) -> None:
        names.append(name)
        real(self, name, *rest)

    monkeypatch.setattr(Staging, "record", record)
    return names


def children(parent: int) -> set[int]:
    """Processes that were started by this one, by the system's own list."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            number, _, rest = status.read_text().partition(" (")
            if int(rest.rpartition(") ")[2].split()[1]) == parent:
                found.add(int(number))
    return found
