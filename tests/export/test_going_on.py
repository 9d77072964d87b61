"""An export that was interrupted goes on, one that is complete is accepted, or replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from loftq_cli.engines import rewriting
from loftq_cli.engines.export_plan import plan_export
from tests.battery import LLAMA_LIKE
from tests.export.conftest import Loftq, contents, report_of, small_files
from tests.rewriting import calls_survived, never_again, stopped_at_the_second_file

TO = ("--container", "compressed-tensors")


@pytest.fixture
def one_block(loftq: Loftq, tmp_path: Path) -> Path:
    """A directory of two weight files, as small as can be."""
    settings = LlamaConfig(**{**LLAMA_LIKE, "num_hidden_layers": 1})
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "source")
    out = tmp_path / "OUT"
    with small_files():
        done = loftq("quantize", "-m", tmp_path / "source", "-o", out, "--container", "gptq",
                     "--rank", 1, "--init", "qlora", "--target-modules", "q_proj")  # fmt: skip
    assert done.code == 0, done.err
    assert len(list(out.glob("model-*"))) == 2
    return out


@pytest.mark.parametrize(
    "options", [(), pytest.param(("--force",), marks=pytest.mark.slow)], ids=["new", "replaces"]
)
def test_killed_at_each_call(one_block: Path, options: tuple[str, ...]) -> None:
    assert calls_survived("export", plan_export(one_block, TO[1]), *options) > 150


def test_an_interrupted_run_goes_on(loftq: Loftq, original: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole" / "OUT", tmp_path / "OUT"
    assert loftq("export", original, *TO, "-o", whole).code == 0
    with stopped_at_the_second_file() as made:
        stopped = loftq("export", original, *TO, "-o", out)
    assert stopped.code == 130
    assert "1 of 3 weight files are kept in" in stopped.err
    assert not out.exists()
    with never_again(made):
        done = loftq("export", original, *TO, "-o", out)
    assert done.code == 0, done.err
    assert "going on with" in done.err
    assert contents(out) == contents(whole)
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == ["OUT"]


def test_another_directory_is_not_mixed_in(
    loftq: Loftq, original: Path, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, another = tmp_path / "OUT", tmp_path / "another" / "OUT"
    done = loftq("quantize", "-m", source, "-o", another, "--container", "gptq", "--rank", 8,
                 "--init", "qlora")  # fmt: skip
    assert done.code == 0, done.err

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rewriting, "copy_file", stopped)
        assert loftq("export", original, *TO, "-o", out).code == 130
    done = loftq("export", another, *TO, "-o", out)
    assert done.code == 1
    assert "an unfinished run of other weights or settings" in done.err
    assert loftq("export", another, *TO, "-o", out, "--force").code == 0
    # Complete now, and accepted as what it is, not as what it is not.
    assert "already exists" in loftq("export", another, *TO, "-o", out).err
    done = loftq("export", another, *TO, "-o", out, "--resume")
    assert done.code == 0
    assert "is already complete" in done.err
    done = loftq("export", original, *TO, "-o", out, "--resume")
    assert done.code == 1
    assert "already exists" in done.err
    # Nor does a run of quantize with the same settings take it for its own.
    done = loftq("quantize", "-m", source, "-o", out, *TO, "--rank", 8, "--init", "qlora",
                 "--resume")  # fmt: skip
    assert done.code == 1
    assert "already exists" in done.err
    assert loftq("export", original, *TO, "-o", out, "--force").code == 0
    assert report_of(out)["results"]["settings"]["rank"] == 4
