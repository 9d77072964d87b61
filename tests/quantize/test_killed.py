"""Runs that are killed at a random moment, and the same line run again."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.battery import BATTERY

# Many small output files, so that there is a next one to be killed in. Everything slow is imported
# before the clock starts: what is killed is the run, not the start of Python.
_LINE = """
import sys
import bitsandbytes, peft, torch, transformers
from loftq_cli.engines import plan
from loftq_cli.cli import main
plan.SHARD_BYTES = 20_000
print("ready", flush=True)
sys.exit(main(sys.argv[1:]))
"""


def start(*argv: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _LINE, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def contents(directory: Path) -> dict[str, bytes]:
    """Every file's bytes; of the report, what does not measure this machine at this moment."""
    found = {}
    for path in directory.rglob("*"):
        if path.is_file():
            found[path.relative_to(directory).as_posix()] = path.read_bytes()
    results = json.loads(found.pop("loftq_report.json"))["results"]
    for layer in results["layers"]:
        del layer["seconds"]
    del results["output"], results["totals"]["seconds"], results["totals"]["peak_memory_bytes"]
    found["loftq_report.json"] = json.dumps(results).encode()
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("killed") / "source"
    BATTERY["llama"].build(dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def kill_and_rerun(source: Path, base: Path, kills: int) -> None:
    reference = base / "reference" / "out"
    reference.parent.mkdir()
    began = time.perf_counter()
    process = start("quantize", "-m", source, "-o", reference)
    began = time.perf_counter()
    _, err = process.communicate()
    whole = time.perf_counter() - began
    assert process.returncode == 0, err
    expected = contents(reference)

    moments = random.Random(5)
    cut = 0
    for number in range(kills):
        place = base / str(number)
        place.mkdir()
        out = place / "out"
        process = start("quantize", "-m", source, "-o", out)
        time.sleep(moments.uniform(0, whole))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        cut += process.returncode == -signal.SIGKILL
        if out.exists():
            assert contents(out) == expected
            continue
        assert {path.name for path in place.iterdir()} <= {"out.partial"}
        process = start("quantize", "-m", source, "-o", out)
        _, err = process.communicate()
        assert process.returncode == 0, err
        assert contents(out) == expected
        assert [path.name for path in place.iterdir()] == ["out"]
    assert cut > kills // 2


def test_three_killed_runs_end_in_the_same_bytes(source: Path, tmp_path: Path) -> None:
    kill_and_rerun(source, tmp_path, 3)


@pytest.mark.slow
def test_fifty_killed_runs_end_in_the_same_bytes(source: Path, tmp_path: Path) -> None:
    kill_and_rerun(source, tmp_path, 50)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_soon_and_says_how_to_go_on(
    number: signal.Signals, code: int, source: Path, tmp_path: Path
) -> None:
    line = ("quantize", "-m", source, "-o", tmp_path / "out")
    process = start(*line)
    assert process.stderr is not None
    # The first plain line of progress: some layers are done, others are not.
    while "quantizing:" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    began = time.perf_counter()
    out, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run was faster than the signal")
    assert time.perf_counter() - began < 10  # a busy machine's second or two
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert "same" in err  # run the same line again to go on
    process = start(*line)
    process.communicate()
    assert process.returncode == 0
