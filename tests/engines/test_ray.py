"""`--engine ray`: a cluster of two nodes on this machine gives the bytes of one process."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import loftq_cli
from loftq_cli import quantize
from loftq_cli.checkpoint.files import LocalFile
from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.engines import cluster as clusters
from loftq_cli.engines import ray as engine
from loftq_cli.engines.cluster import connected
from loftq_cli.errors import DoesNotFit, LoftqError
from tests.battery import BATTERY, Entry
from tests.engines import full_disk
from tests.engines.conftest import LINE, OPTIONS, Watching, children
from tests.quantize.test_killed import Loftq, contents, finished

ray = pytest.importorskip("ray")
# Ray leaves sockets and files to the garbage collector, at its own end too.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]
DEMO = Path(loftq_cli.__file__).parent / "demo"
NODE = {"num_cpus": 1, "memory": 2 * 10**9, "object_store_memory": 80 * 10**6}


class Two:
    """The cluster; `second` is the node that is not the head."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as Started

        head = {**NODE, "include_dashboard": False}
        self.started = Started(initialize_head=True, head_node_args=head)
        self.second = self.started.add_node(**NODE)
        self.address = self.started.address

    def options(self) -> dict[str, Any]:
        return {**OPTIONS, "engine": "ray", "ray_address": self.address}


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    # Python warns where a child has threads; it would be an error here.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # other work fills this machine
        patch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
        found = Two()
        yield found
        found.started.shutdown()


def test_two_nodes_write_what_one_process_writes(
    two: Two, source: Path, expected: dict[str, bytes], recorded: list[str], tmp_path: Path
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    heard = Watching()
    out = tmp_path / "out"
    document = quantize(str(source), output=out, listener=heard, **two.options())
    assert contents(out) == expected
    assert len(set(heard.done)) == len(heard.done) == 56
    weights = [name for name in recorded if name.startswith("model-")]
    assert len(weights) == len(set(weights)) == 9
    said = document.resolved["engine"]
    assert said.value == "ray"
    assert "2 nodes, 2 at once" in said.reason
    assert document.timings_seconds["connect"] > 0
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not ray.is_initialized()


def test_calibrated_layers_of_a_block_run_side_by_side(
    two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loftq_cli.models.texts.LONGEST_WINDOW", 64)
    text, source = tmp_path / "text.txt", tmp_path / "source"
    text.write_text((DEMO / "calibration.txt").read_text("utf-8")[:6_000], "utf-8")
    entry = BATTERY["gpt2"]
    config = {**entry.config, "vocab_size": 4096}
    Entry(entry.model_class, entry.config_class, config).build().save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, source)
    written = []
    for place, options in (("one", OPTIONS), ("two", two.options())):
        out = tmp_path / place / "out"
        quantize(str(source), output=out, init="calibrated", calibration_text=text, **options)
        written.append(contents(out))
    assert written[0] == written[1]


def test_a_node_that_differs_is_named(
    two: Two, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(source)
    (header,) = checkpoint.headers.values()
    elsewhere = replace(header, source=LocalFile(tmp_path / "not-there.safetensors", (1, 1)))
    with connected(two.address) as cluster:
        with pytest.raises(LoftqError, match=r"^node .*not-there\.safetensors is not seen"):
            cluster.require_sight(replace(checkpoint, headers={"x": elsewhere}), tmp_path)
        monkeypatch.setattr(clusters, "__version__", "99")
        with pytest.raises(LoftqError, match=r"^node .*: loftq is .*, and 99 where the run was"):
            cluster.require_sight(checkpoint, tmp_path)


# --- what is lost in the middle -------------------------------------------------------------------

LONG = {**OPTIONS, "iterations": 60}
LONG_LINE = (*LINE[:2], "--iterations", 60, *LINE[4:])


@pytest.fixture(scope="module")
def long(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same of tasks that take long enough to be in the middle of one."""
    out = tmp_path_factory.mktemp("long") / "out"
    quantize(str(source), output=out, **LONG)  # type: ignore[arg-type]
    return contents(out)


def run_through(
    at: Callable[[], None], two: Two, source: Path, long: dict[str, bytes], out: Path
) -> list[str]:
    """What was noted of a run in which ``at`` is called when a file is done."""
    heard = Watching(at)
    asked = {**LONG, "engine": "ray", "ray_address": two.address}
    quantize(str(source), output=out, listener=heard, **asked)
    assert contents(out) == long
    assert len(set(heard.done)) == len(heard.done) == 56
    return heard.notes


def at_work(raylet: int) -> Iterator[int]:
    """Processes of this node that are at a task of ours."""
    for each in children(raylet):
        with suppress(OSError):
            if Path(f"/proc/{each}/cmdline").read_bytes().startswith(b"ray::_run"):
                yield each


@pytest.mark.slow
def test_a_worker_killed_in_the_middle(
    two: Two, recorded: list[str], source: Path, long: dict[str, bytes], tmp_path: Path
) -> None:
    nodes = [two.started.head_node, two.second]
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]

    def kill() -> None:
        for _ in range(500):
            for raylet in raylets:
                for each in at_work(raylet):
                    os.kill(each, signal.SIGKILL)
                    return
            time.sleep(0.01)
        raise AssertionError("nobody was at work")

    notes = run_through(kill, two, source, long, tmp_path / "out")
    assert sum("is made again" in note for note in notes) == 1, notes
    weights = [name for name in recorded if name.startswith("model-")]
    assert len(weights) == len(set(weights)) == 9


@pytest.mark.slow
def test_a_node_removed_in_the_middle(
    two: Two, recorded: list[str], source: Path, long: dict[str, bytes], tmp_path: Path
) -> None:
    notes = run_through(
        lambda: two.started.remove_node(two.second, allow_graceful=False),
        two, source, long, tmp_path / "out",
    )  # fmt: skip
    assert any("is made again" in note for note in notes), notes
    weights = [name for name in recorded if name.startswith("model-")]
    assert len(weights) == len(set(weights)) == 9
    two.second = two.started.add_node(**NODE)


@pytest.mark.slow
def test_a_driver_killed_in_the_middle(
    two: Two, source: Path, long: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    line = ("quantize", "-m", source, "-o", out, "--engine", "ray",
            "--ray-address", two.address, *LONG_LINE)  # fmt: skip
    killed = Loftq(tmp_path, *line)
    while finished(tmp_path) < 4:
        assert killed.process.is_alive(), killed.err
    killed.send(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    before = finished(tmp_path)
    kept = {
        path.name: path.stat().st_ino
        for path in (tmp_path / "out.partial" / "output").glob("model-*")
    }
    again = Loftq(tmp_path, *line)
    assert again.wait() == 0, again.err
    assert contents(out) == long
    same = sum((out / name).stat().st_ino == inode for name, inode in kept.items())
    assert same >= before // 2  # each with its part of the adapter


@pytest.mark.slow
def test_a_full_disk_on_a_node(
    two: Two, source: Path, expected: dict[str, bytes], recorded: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_run", full_disk.run)
        told = rf"^node .*: no room to write .*{full_disk.NAME}"
        with pytest.raises(DoesNotFit, match=told) as caught:
            quantize(str(source), output=out, **two.options())
    full_disk.require_told(caught.value, recorded)
    quantize(str(source), output=out, **two.options())
    assert contents(out) == expected
    full_disk.require_each_once(recorded)
