"""Packed codes in floating tensors, sharded over two processes on a CPU by FSDP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.report.sharded import LAUNCH
from tests.battery import BATTERY
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]
# The dtype of the model, and what is asked for beside it.
DIRECTORIES = {
    "float32": (torch.float32, ("--quant-storage", "float32")),
    "bfloat16": (
        torch.bfloat16,
        ("--quant-storage", "bfloat16", "--adapter-dtype", "bfloat16"),
    ),
    "bytes": (torch.bfloat16, ("--adapter-dtype", "bfloat16")),
}
# A directory, a way to shard (see `sharded.py`), and whether PEFT makes the adapter float32.
Job = tuple[str, str, bool]
AS_ONE: list[Job] = [
    ("float32", "fsdp2", False),
    ("bfloat16", "fsdp2", False),
    ("bfloat16", "fsdp1", True),
    ("bfloat16", "fsdp1-blocks", False),
]
JOBS: list[Job] = [
    *AS_ONE,
    ("bfloat16", "fsdp2-float16", False),
    ("bfloat16", "fsdp1-blocks", True),
    ("bytes", "fsdp2", False),
    ("bytes", "fsdp1", False),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, loftq: Loftq) -> Path:
    """The directories, in one."""
    place = tmp_path_factory.mktemp("sharded")
    for name, (dtype, options) in DIRECTORIES.items():
        BATTERY["llama"].build(dtype=dtype).save_pretrained(place / "source" / name)
        line = ("quantize", "-m", place / "source" / name, "-o", place / name)
        done = loftq(*line, "--rank", 4, "--iterations", 1, *options)
        assert done.code == 0, done.err
    return place


@pytest.fixture(scope="module")
def found(made: Path) -> dict[Job, list[dict[str, Any]]]:
    """What each of the two processes says of each job."""
    jobs = [(str(made / name), way, autocast) for name, way, autocast in JOBS]
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.sharded", json.dumps(jobs)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    return {job: [each[place] for each in said] for place, job in enumerate(JOBS)}


@pytest.mark.parametrize("job", AS_ONE, ids=str)
def test_two_processes_compute_and_train_as_one(job: Job, found: Any) -> None:
    for said in found[job]:
        assert said["local"] == pytest.approx(0.5, abs=0.01), "half of all parameters each"
        assert said["same_outputs"]
        assert said["moved"] > 0.2, "a step that nobody would overlook"
        assert said["deviation"] < (1e-5 if job[0] == "float32" else 0.05)
        assert said["codes_kept"] == (True if job[1] == "fsdp2" else None)


def test_bytes_are_not_sharded(found: Any) -> None:
    """Why there is --quant-storage: whole on every GPU, or refused."""
    left_whole, refused = found["bytes", "fsdp2", False], found["bytes", "fsdp1", False]
    for each in left_whole:
        assert each["local"] > 0.7
        assert each["same_outputs"]
    for each in refused:
        assert "Cannot flatten integer dtype tensors" in each["refused"]


def test_blocks_of_one_dtype_want_the_adapter_in_it(found: Any) -> None:
    """Why there is --adapter-dtype, and `autocast_adapter_dtype=False` beside it."""
    for refused in found["bfloat16", "fsdp1-blocks", True]:
        assert "uniform dtype" in refused["refused"]


def test_mixed_precision_in_another_dtype_spoils_the_codes(found: Any) -> None:
    for said in found["bfloat16", "fsdp2-float16", False]:
        assert not said["same_outputs"]


def test_the_readme_says_how(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import launch_command_parser

    card = (made / "bfloat16" / "README.md").read_text()
    assert "## Fine-tune on several GPUs" in card
    load = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0]
    assert "is_trainable=True, autocast_adapter_dtype=False\n)" in load
    monkeypatch.chdir(made)
    names: dict[str, Any] = {}
    exec(load, names)
    dtypes = {each.dtype for each in names["model"].parameters()}
    assert dtypes == {torch.bfloat16}, "one for all, as FSDP 1 wants it"
    assert LAUNCH in card
    words = LAUNCH.replace("\\\n", " ").split()
    asked = launch_command_parser().parse_args(words[2:])
    assert (asked.use_fsdp, asked.fsdp_version, asked.mixed_precision) == (True, "2", "no")
    assert "vLLM and SGLang refuse" in card
    assert "--adapter-dtype" not in card
    alone = (made / "float32" / "README.md").read_text()
    assert "autocast_adapter_dtype" not in alone, "which float32 does not change"
    usual = (made / "bytes" / "README.md").read_text()
    assert "several GPUs" not in usual.replace("split over several GPUs there", "")
    assert "install `vllm-bnb-plugin`" in usual
