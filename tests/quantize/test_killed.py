"""Runs that are killed at a random moment, and the same line run again."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from loftq_cli.checkpoint.staging import MANIFEST_FILE
from loftq_cli.containers import container_names
from tests.battery import BATTERY
from tests.forks import Forked


def run(argv: list[str]) -> None:
    """What a run of `loftq` does, with many small output files: there is a next to be killed in."""
    from loftq_cli.cli import main
    from loftq_cli.engines import shards

    shards.SHARD_BYTES = 20_000
    sys.exit(main(argv))


class Loftq(Forked):
    """A running `loftq`. What is killed is the run, not the start of Python."""

    def __init__(self, scratch: Path, *argv: object) -> None:
        super().__init__(scratch, run, list(map(str, argv)))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file's bytes; of the report, what does not measure this machine at this moment."""
    found = {}
    for path in directory.rglob("*"):
        if path.is_file():
            found[path.relative_to(directory).as_posix()] = path.read_bytes()
    results = json.loads(found.pop("loftq_report.json"))["results"]
    for layer in results["layers"]:
        del layer["seconds"]
    if results["distillation"] is not None:
        del results["distillation"]["seconds"]
    del results["output"], results["totals"]["seconds"], results["totals"]["peak_memory_bytes"]
    found["loftq_report.json"] = json.dumps(results).encode()
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("killed") / "source"
    BATTERY["llama"].build(dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def finished(place: Path) -> int:
    """How many files a run under way has recorded as finished."""
    with contextlib.suppress(FileNotFoundError):
        manifest = (place / "out.partial" / MANIFEST_FILE).read_text()
        return len(json.loads(manifest)["finished"])
    return 0


def kill_and_rerun(source: Path, container: str, base: Path, kills: int, *more: object) -> None:
    """Kills runs when some files are finished, and a moment later; the moments are random.

    They are asked for with ``more`` options.
    """
    reference = base / "reference" / "out"
    reference.parent.mkdir()
    asked = ("quantize", "-m", source, "--container", container, *more, "-o")
    whole = Loftq(base, *asked, reference)
    assert whole.wait() == 0, whole.err
    expected = contents(reference)
    weights = sum(name.endswith(".safetensors") for name in expected) - 1  # but for the adapter

    moments = random.Random(5)
    cut = 0
    for number in range(kills):
        place = base / str(number)
        place.mkdir()
        line = (*asked, place / "out")
        killed = Loftq(base, *line)
        files = moments.randrange(2 * weights)  # each with its part of the adapter
        while killed.process.is_alive() and finished(place) < files:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        killed.send(signal.SIGKILL)
        cut += killed.wait() == -signal.SIGKILL
        if (place / "out").exists():
            assert contents(place / "out") == expected
            continue
        assert {path.name for path in place.iterdir()} <= {"out.partial"}
        again = Loftq(base, *line)
        assert again.wait() == 0, again.err
        assert contents(place / "out") == expected
        assert [path.name for path in place.iterdir()] == ["out"]
    assert cut


@pytest.mark.parametrize("container", container_names())
def test_killed_runs_end_in_the_same_bytes(container: str, source: Path, tmp_path: Path) -> None:
    kill_and_rerun(source, container, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("container", container_names())
def test_fifty_killed_runs_end_in_the_same_bytes(
    container: str, source: Path, tmp_path: Path
) -> None:
    kill_and_rerun(source, container, tmp_path, 50)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_soon_and_says_how_to_go_on(
    number: signal.Signals, code: int, source: Path, tmp_path: Path
) -> None:
    line = ("quantize", "-m", source, "-o", tmp_path / "out")
    stopped = Loftq(tmp_path, *line)
    # The first plain line of progress: some layers are done, others are not.
    while "quantizing:" not in stopped.err:
        assert stopped.process.is_alive()
    stopped.send(number)
    status = stopped.wait()
    if status == 0:
        pytest.skip("the run was faster than the signal")
    assert status == code
    assert stopped.out == ""
    assert "Traceback" not in stopped.err
    assert not (tmp_path / "out").exists()
    assert "same" in stopped.err  # run the same line again to go on
    assert Loftq(tmp_path, *line).wait() == 0
