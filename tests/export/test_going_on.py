"""An export that was interrupted goes on, one that is complete is accepted, or replaced."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import loftq_cli
from loftq_cli.engines import rewriting
from loftq_cli.engines.export_plan import plan_export
from tests.battery import LLAMA_LIKE
from tests.export.conftest import Loftq, contents, report_of, small_files

PROGRAM = Path(__file__).parents[1] / "checkpoint" / "killed_at_each_call.py"
TO = ("--container", "compressed-tensors")


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """For hundreds of runs, of which each would wait for a disk."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


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
def test_killed_at_each_call(one_block: Path, options: tuple[str, ...], memory_path: Path) -> None:
    """Every system call of an export is the last one once; run again, it ends in the same bytes."""
    plan = memory_path / "plan"
    plan.write_bytes(pickle.dumps(plan_export(one_block, TO[1])))
    result = subprocess.run(
        [sys.executable, PROGRAM, memory_path, *options, "--export", plan],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(loftq_cli.__file__).parents[1]),
        },
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) > 150


def test_an_interrupted_run_goes_on(
    loftq: Loftq, original: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole" / "OUT", tmp_path / "OUT"
    assert loftq("export", original, *TO, "-o", whole).code == 0
    write, made = rewriting.write_safetensors, []

    def stopped_at_the_second(path: Path, *rest: Any) -> Any:
        if made:
            raise KeyboardInterrupt
        made.append(path.name)
        return write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(rewriting, "write_safetensors", stopped_at_the_second)
        stopped = loftq("export", original, *TO, "-o", out)
    assert stopped.code == 130
    assert "1 of 3 weight files are kept in" in stopped.err
    assert not out.exists()

    def not_again(path: Path, *rest: Any) -> Any:
        assert path.name not in made
        return write(path, *rest)

    monkeypatch.setattr(rewriting, "write_safetensors", not_again)
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
