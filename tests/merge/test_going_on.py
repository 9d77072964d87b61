"""A merge that was interrupted goes on, one that is complete is accepted, or replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loftq_cli.engines import rewriting, shards
from loftq_cli.engines.merge_plan import plan_merge
from tests.battery import LLAMA_LIKE
from tests.checkpoint.staged_run import contents
from tests.merge.conftest import Loftq, Trained, make
from tests.rewriting import calls_survived, never_again, stopped_at_the_second_file


@pytest.fixture(scope="module")
def sharded(loftq: Loftq, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """In several files, as a model of any size is."""
    place = tmp_path_factory.mktemp("sharded")
    made = make(loftq, place, "llama", "--init", "qlora", file_bytes=20_000)
    assert len(list(made.base.glob("model-*"))) == 3
    return made


def merge(loftq: Loftq, trained: Trained, out: Path, *options: object) -> Any:
    return loftq("merge", trained.base, "--adapter", trained.adapter, "-o", out, *options)


@pytest.mark.slow  # the way of writing is that of exports, which are killed so in every run
@pytest.mark.parametrize("options", [(), ("--force",)], ids=["new", "replaces"])
def test_killed_at_each_call(
    loftq: Loftq,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    settings = LlamaConfig(**{**LLAMA_LIKE, "num_hidden_layers": 1})
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "source")
    base = tmp_path / "OUT"
    done = loftq("quantize", "-m", tmp_path / "source", "-o", base, "--container", "gptq",
                 "--rank", 1, "--iterations", 1, "--target-modules", "q_proj")  # fmt: skip
    assert done.code == 0, done.err
    assert len(list(base.glob("model-*"))) == 2
    assert calls_survived("merge", plan_merge(base, None), *options) > 100


def test_an_interrupted_run_goes_on(loftq: Loftq, sharded: Trained, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole" / "MERGED", tmp_path / "MERGED"
    assert merge(loftq, sharded, whole).code == 0
    with stopped_at_the_second_file() as made:
        stopped = merge(loftq, sharded, out)
    assert stopped.code == 130
    assert "1 of 3 weight files are kept in" in stopped.err
    assert not out.exists()
    # Another adapter, or dtype, is not mixed in.
    unlike = merge(loftq, sharded, out, "--dtype", "float16")
    assert unlike.code == 1
    assert "dtype was null and is" in unlike.err
    unlike = loftq("merge", sharded.base, "-o", out)
    assert unlike.code == 1
    assert "adapter.adapter_model.safetensors was" in unlike.err
    with never_again(made):
        done = merge(loftq, sharded, out)
    assert done.code == 0, done.err
    assert "going on with" in done.err
    assert contents(out) == contents(whole)
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == ["MERGED"]
    assert AutoModelForCausalLM.from_pretrained(out)


def test_a_complete_one_is_accepted_or_replaced(
    loftq: Loftq, sharded: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "MERGED"
    first = merge(loftq, sharded, out, "--json")
    before = contents(out)
    assert merge(loftq, sharded, out).code == 1

    def never(*_: Any) -> Any:
        raise AssertionError("it is complete")

    with monkeypatch.context() as patch:
        patch.setattr(rewriting, "write_safetensors", never)
        again = merge(loftq, sharded, out, "--resume", "--json")
    assert again.code == 0, again.err
    assert "is already complete" in again.err
    assert '"output_deviation"' in again.out
    assert (
        again.out.partition('"results"')[2].partition('"seconds"')[0]
        == (first.out.partition('"results"')[2].partition('"seconds"')[0])
    )
    assert merge(loftq, sharded, out, "--resume", "--dtype", "float16").code == 1
    assert merge(loftq, sharded, out, "--force", "--dtype", "float16").code == 0
    assert contents(out) != before
