"""A model of eight blocks, each a file of its own, and what one process makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loftq_cli import quantize
from loftq_cli.engines import shards
from tests.quantize.test_killed import contents

OPTIONS = {"rank": 4, "iterations": 2, "double_quant": True, "device": "cpu"}
LINE = ("--rank", 4, "--iterations", 2, "--double-quant", "--device", "cpu")


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
