"""Which tensors share an output file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loftq_cli.checkpoint.staging import Staging
from loftq_cli.engines import local, output
from loftq_cli.engines import shards as module
from loftq_cli.engines.plan import Plan, PlannedLayer, Task
from loftq_cli.engines.settings import Settings
from loftq_cli.engines.shards import shards
from loftq_cli.engines.tasks import run_task
from loftq_cli.errors import LoftqError
from loftq_cli.models import layers
from loftq_cli.models.layers import LeftTensor, LinearLayer, block_of
from tests.battery import BATTERY
from tests.conftest import Outcome

Entry = PlannedLayer | LeftTensor


def layer(name: str) -> PlannedLayer:
    return PlannedLayer(LinearLayer(name, f"{name}.weight", 8, 8, False, "BF16"), 4, 2)


def copied(name: str) -> LeftTensor:
    return LeftTensor(name, (8,), "BF16", "a norm", 16)


def test_layers_that_an_order_does_not_name_stay_in_their_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checkpoints name block 10 before block 2, models run it after."""
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    blocks = sorted(map(str, range(12)))
    names = ("mlp.experts.0.up", "attn.q", "attn.k")
    entries = [layer(f"h.{block}.{name}") for block in blocks for name in names]
    order = [f"h.{block}.{name}" for block in range(12) for name in ("attn.k", "attn.q")]
    plan = Plan(Settings(rank=2), (Task("model.safetensors", tuple(entries)),)).in_order(order)
    assert [block_of(task.layers[0].layer.module) for task in plan.tasks] == [
        f"h.{block}" for block in range(12)
    ]
    last = [planned.layer.module for planned in plan.tasks[-1].layers]
    assert last == [f"h.11.{name}" for name in ("mlp.experts.0.up", "attn.k", "attn.q")]


def names(groups: list[list[Entry]]) -> list[list[str]]:
    return [[entry.tensor for entry in group] for group in groups]


def model(blocks: int) -> list[Entry]:
    """In the alphabetical order of many checkpoints."""
    entries: list[Entry] = [copied("lm_head.weight"), copied("model.embed_tokens.weight")]
    for number in sorted(range(blocks), key=str):
        entries += [copied(f"model.layers.{number}.norm.weight"), layer(f"model.layers.{number}.q")]
    return [*entries, copied("model.norm.weight")]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 100)


def test_a_model_of_less_is_one_file_in_the_order_it_came() -> None:
    entries = model(3)
    assert shards(entries, lambda _: 100 // len(entries)) == [entries]


@pytest.mark.parametrize(("size", "together"), [(10, 5), (20, 2), (30, 1), (500, 1)])
def test_a_file_has_as_many_whole_blocks_as_fit(size: int, together: int) -> None:
    entries = model(12)
    first, *rest = shards(entries, lambda _: size)
    assert names([first]) == [["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]]
    found = [{block_of(entry.tensor) for entry in group} for group in rest]
    assert [len(blocks) for blocks in found[:-1]] == [together] * (len(found) - 1)
    assert Counter(block for blocks in found for block in blocks) == Counter(
        f"model.layers.{number}" for number in range(12)
    )


def test_every_entry_is_in_one_file_and_stacks_are_told_apart() -> None:
    entries: list[Entry] = [
        layer(f"{stack}.block.{number}.q") for stack in ("decoder", "encoder") for number in (0, 1)
    ]
    groups = shards(entries, lambda _: 60)
    assert names(groups) == [[entry.tensor] for entry in entries]


def test_layers_outside_come_when_their_turn_is() -> None:
    """In the order of a calibration: what is only copied first, then layers as they are run."""
    entries: list[Entry] = [
        copied("blocks.1.norm.weight"),
        copied("norm.weight"),
        layer("stem"),
        layer("blocks.0.q"),
        layer("blocks.1.q"),
        layer("pooler"),
        layer("head"),
    ]
    assert names(shards(entries, lambda _: 60)) == [
        ["norm.weight", "stem.weight"],
        ["blocks.0.q.weight"],
        ["blocks.1.norm.weight", "blocks.1.q.weight"],
        ["pooler.weight", "head.weight"],
    ]


def test_the_block_of_a_name() -> None:
    assert block_of("model.layers.3.mlp.experts.7.w1.weight") == "model.layers.3"
    assert block_of("h.11.attn.c_attn.weight") == "h.11"
    assert block_of("lm_head.weight") is None


@pytest.mark.parametrize("earlier", [40_000, 10_000_000])
def test_only_a_run_that_was_divided_into_other_files_is_begun_anew(
    earlier: int, tmp_path: Path, loftq: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    BATTERY["gpt2"].build(dtype=torch.bfloat16).save_pretrained(source)
    line = ("quantize", "-m", source, "--rank", 2, "--iterations", 1, "-o")
    monkeypatch.setattr(module, "SHARD_BYTES", 40_000)
    assert loftq(*line, tmp_path / "whole").code == 0

    def stop(_: Staging) -> None:
        raise LoftqError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(module, "SHARD_BYTES", earlier)
        patch.setattr(Staging, "commit", stop)
        assert loftq(*line, tmp_path / "out").code == 1
    made = []
    monkeypatch.setattr(local, "run_task", lambda *given: made.append(given) or run_task(*given))
    outcome = loftq(*line, tmp_path / "out")
    assert outcome.code == 0
    assert ("starting over" in outcome.err) == (earlier != 40_000)
    assert bool(made) == (earlier != 40_000)
    whole, out = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")}
        for name in ("whole", "out")
    )
    assert len(whole) > 2
    assert out == whole


def test_a_run_that_other_libraries_planned_is_begun_anew(
    tmp_path: Path, loftq: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another PEFT may take another set of adapters, and its share of them is on the disk."""
    source = tmp_path / "source"
    BATTERY["gpt2"].build(dtype=torch.bfloat16).save_pretrained(source)
    line = ("quantize", "-m", source, "--rank", 2, "--iterations", 1, "-o")
    monkeypatch.setattr(module, "SHARD_BYTES", 40_000)
    assert loftq(*line, tmp_path / "whole").code == 0

    def stop(*_: object) -> None:
        raise LoftqError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(layers, "_EXPERTS_LIKE_QWEN2", {"gpt2"})
        patch.setattr(layers, "_MOVED_BY_PEFT", ("c_fc",))
        patch.setattr(output, "join_adapter", stop)
        assert loftq(*line, tmp_path / "out").code == 1
    outcome = loftq(*line, tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "starting over" in outcome.err
    names = ("loftq_init/adapter_model.safetensors", "loftq_init/adapter_config.json")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes().replace(b'"out"', b'"whole"') == (
            tmp_path / "whole" / name
        ).read_bytes()
