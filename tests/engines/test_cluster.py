"""What a run asks of a Ray cluster, and what it refuses, without one."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from loftq_cli.engines import cluster as clusters
from loftq_cli.engines.cluster import Cluster, Need, Node, Sight, connected
from loftq_cli.errors import DoesNotFit, LoftqError, UsageError
from loftq_cli.options import QuantizeOptions
from tests.conftest import Outcome

GB = 10**9


class Pretended(Cluster):
    """(cores, GPUs, GB) of each node."""

    def __init__(self, *nodes: tuple[int, int, int]) -> None:
        super().__init__()
        self.found = [
            Node(str(number), f"n{number}", cpus, gpus, memory * GB)
            for number, (cpus, gpus, memory) in enumerate(nodes)
        ]

    def nodes(self) -> list[Node]:
        return self.found


@pytest.mark.parametrize(
    ("nodes", "tasks", "cores", "at_once"),
    [
        ([(2, 0, 8)], 100, 1, 2),
        ([(64, 0, 64)], 100, 2, 32),  # memory for 32 of 2 GB: the cores are shared among them
        ([(64, 0, 512)], 8, 8, 8),  # no more tasks than that
        ([(64, 0, 64), (4, 0, 64)], 100, 1, 36),
        ([(64, 0, 64), (4, 0, 1)], 100, 2, 32),  # the second has no room for any
    ],
)
def test_a_task_takes_the_cores_that_there_are(
    nodes: list[tuple[int, int, int]], tasks: int, cores: int, at_once: int
) -> None:
    cluster = Pretended(*nodes)
    need = cluster.need(2 * GB, "cpu", tasks)
    assert need == Need(cores, 0, 2 * GB)
    assert min(tasks, sum(node.tasks(need) for node in cluster.nodes())) == at_once


def test_gpus() -> None:
    cluster = Pretended((32, 8, 256), (32, 0, 256))
    assert cluster.device("auto").value == cluster.device("cuda").value == "cuda:0"
    assert cluster.device("cpu").value == "cpu"
    need = cluster.need(2 * GB, "cuda:0", 100)
    assert need == Need(4, 1, 2 * GB)
    assert [node.tasks(need) for node in cluster.nodes()] == [8, 0]
    without = Pretended((32, 0, 256))
    assert without.device("auto").value == "cpu"
    with pytest.raises(LoftqError, match="no node of the cluster has a GPU"):
        without.device("cuda")


def test_a_task_that_fits_on_no_node() -> None:
    with pytest.raises(DoesNotFit, match="no node") as caught:
        Pretended((64, 0, 4), (2, 0, 8)).need(10 * GB, "cpu", 9)
    assert "10.0 GB" in str(caught.value.cause)
    assert "8.00 GB" in str(caught.value.cause)


def test_nothing_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(LoftqError, match="nothing answers") as caught, connected(address):
            pass
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "ray", "--workers", "2"], "--workers is for one machine"),
        (["--engine", "ray", "--max-memory", "4GB"], "--max-memory is for one machine"),
        (["--engine", "ray", "--device", "cuda:1"], "Ray deals out the GPUs itself"),
        (["--engine", "ray", "--ray-address", "ray://head:10001"], "auto, local or HOST:PORT"),
        (["--ray-address", "local"], "--ray-address is for --engine ray"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_does_not_go_together(
    options: list[str], said: str, loftq: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = loftq("quantize", "-o", tmp_path / "out", *options)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        clusters.require_cluster_options(QuantizeOptions(engine="ray"))
    assert caught.value.exit_code == 2
    assert caught.value.hint == "pip install 'loftq[ray]'"


def test_what_a_node_has_to_see(tmp_path: Path) -> None:
    weights, mark = tmp_path / "w.safetensors", tmp_path / "out" / "mark"
    mark.parent.mkdir()
    weights.write_bytes(b"weights")
    mark.touch()
    status = weights.stat()
    files = ((weights, (status.st_size, status.st_mtime_ns)),)
    sight = Sight(clusters._versions(), files, mark)
    assert "bits" in sight.require()
    others = tuple((name, "0") for name, _ in sight.versions)
    with pytest.raises(LoftqError, match=r"loftq is .*, and 0 where the run was started"):
        replace(sight, versions=others).require()
    os.utime(weights, ns=(0, 0))
    with pytest.raises(LoftqError, match=r"w\.safetensors is another file"):
        sight.require()
    os.utime(weights, ns=(0, status.st_mtime_ns))
    mark.unlink()
    with pytest.raises(LoftqError, match="out is not the directory that is written"):
        sight.require()
    weights.unlink()
    with pytest.raises(LoftqError, match=r"w\.safetensors is not seen"):
        sight.require()
