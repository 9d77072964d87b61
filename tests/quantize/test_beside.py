"""What goes with the weights into the output: all of a model, and nothing of this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.checkpoint import writer
from loftq_cli.models.companions import OUTWARD_LINK
from tests.battery import BATTERY
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]
LINE = ("--rank", 4, "--iterations", 1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sentence embedding model as sentence-transformers saves one."""
    source = tmp_path / "source"
    BATTERY["bert"].build(dtype=torch.bfloat16).save_pretrained(source)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for n, (path, kind) in enumerate(modules)
        ],
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        "sentence_bert_config.json": {"max_seq_length": 64},
        "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
    }
    for name, content in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(json.dumps(content))
    (source / "2_Normalize").mkdir()
    return source


def results(out: Path) -> Any:
    return json.loads((out / "loftq_report.json").read_text())["results"]


def test_a_sentence_embedding_model_stays_one(source: Path, tmp_path: Path, loftq: Loftq) -> None:
    out = tmp_path / "out"
    done = loftq("quantize", "-m", source, "-o", out, *LINE)
    assert done.code == 0, done.err
    assert "not copied" not in done.err
    made = {"config.json", "model.safetensors"}
    for path in source.rglob("*"):
        name = path.relative_to(source)
        assert (out / name).exists()
        if path.is_file() and str(name) not in made:
            assert (out / name).read_bytes() == path.read_bytes()
    listed = {file["name"] for file in results(out)["files"]}
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= listed
    assert loftq("verify", out).code == 0
    (out / "1_Pooling" / "config.json").write_text("{}")
    damaged = loftq("verify", out)
    assert damaged.code == 3
    assert "'1_Pooling/config.json' is not the file that was written" in damaged.err


def test_nothing_from_outside_the_model(source: Path, tmp_path: Path, loftq: Loftq) -> None:
    (source / "LICENSE").symlink_to("/etc/hostname")
    (source / "README.md").write_text("theirs")
    (source / "loftq_init").mkdir()
    (source / "loftq_init" / "adapter_config.json").write_text("{}")
    # Weights may lie wherever their owner keeps them: not their bytes are written.
    (source / "model.safetensors").rename(tmp_path / "weights")
    (source / "model.safetensors").symlink_to(tmp_path / "weights")
    out = tmp_path / "out"
    done = loftq("quantize", "-m", source, "-o", out, *LINE)
    assert done.code == 0, done.err
    assert f"warning: not copied: LICENSE ({OUTWARD_LINK})" in done.err
    assert not os.path.lexists(out / "LICENSE")
    assert (out / "README.md").read_text().startswith("# out")
    assert {each["name"] for each in results(out)["not_copied"]} == {
        "LICENSE",
        "README.md",
        "loftq_init",
    }
    assert loftq("verify", out).code == 0
    page = loftq("report", out / "loftq_report.json", "--format", "md").out
    assert "not copied: LICENSE" in page


def test_there_must_be_room_for_them_too(
    source: Path, tmp_path: Path, loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 1_000_000
    monkeypatch.setattr(writer, "free_bytes", lambda _: free)
    with (source / "tokenizer.model").open("wb") as file:
        file.truncate(free)
    done = loftq("quantize", "-m", source, "-o", tmp_path / "out", *LINE)
    assert done.code == 4
    assert "no room to write" in done.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_report_from_before_anything_was_left_out(
    source: Path, tmp_path: Path, loftq: Loftq
) -> None:
    out = tmp_path / "out"
    loftq("quantize", "-m", source, "-o", out, *LINE)
    report = json.loads((out / "loftq_report.json").read_text())
    del report["results"]["not_copied"]
    (out / "loftq_report.json").write_text(json.dumps(report))
    assert loftq("verify", out).code == 0
