"""A small written directory, and a hub on loopback that takes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from loftq_cli.engines import shards
from tests.battery import BATTERY
from tests.conftest import Outcome
from tests.models.stand_in_hub import talk_to
from tests.push.writable_hub import TOKEN, WritableHub, running_writable

Loftq = Callable[..., Outcome]
CARD = "---\nlicense: other\nlicense_name: a-licence\nlicense_link: LICENSE\n---\n# A model\n"


@pytest.fixture(scope="session")
def originals(loftq: Loftq, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a card, and what `quantize` makes of it, in several files."""
    directory = tmp_path_factory.mktemp("originals")
    BATTERY["llama"].build(dtype=torch.bfloat16).save_pretrained(directory / "source")
    (directory / "source" / "README.md").write_text(CARD)
    (directory / "source" / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 20_000)
        done = loftq("quantize", "-m", directory / "source", "-o", directory / "out",
                     "--rank", 4, "--iterations", 1)  # fmt: skip
    assert done.code == 0, done.err
    return directory


@pytest.fixture
def written(originals: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(originals / "out", tmp_path / "out"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WritableHub]:
    """huggingface_hub in this process talks to this hub, with a token that it knows."""
    with running_writable(WritableHub()) as hub:
        talk_to(hub, monkeypatch, tmp_path, TOKEN)
        yield hub
