"""A Ray cluster, as far as a run has to know it: its nodes, and whether each can do a task.

A node can if it has the libraries of this process and sees the same files, so that it makes no
difference where a task runs.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loftq_cli import __version__, hardware
from loftq_cli.checkpoint.files import LocalFile, stamp_of
from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.checkpoint.writer import TEMPORARY_SUFFIX, disk_errors
from loftq_cli.errors import DoesNotFit, LoftqError, UsageError, first_line
from loftq_cli.options import QuantizeOptions
from loftq_cli.report.units import size

# Of these every node has to have the same version: they decide the bytes, or read them.
_LIBRARIES = ("torch", "numpy", "numba", "bitsandbytes", "safetensors", "transformers", "ray")
_ANSWER_SECONDS = 5.0  # of a head that is there
_LOOK_SECONDS = 120.0  # of a node that has to start Python and import torch


def require_cluster_options(asked: QuantizeOptions) -> None:
    """Refuses what does not go with --engine ray, and Ray where it is not installed.

    Raises:
        UsageError
    """
    if asked.engine != "ray":
        if asked.ray_address != QuantizeOptions.ray_address:
            raise UsageError("--ray-address is for --engine ray", hint="add --engine ray")
        return
    for name in ("workers", "max_memory"):
        if getattr(asked, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is for one machine",
                cause="Ray deals out what its nodes have by what a task is estimated to take",
                hint="leave it out",
            )
    if asked.device not in ("auto", "cpu", "cuda"):
        raise UsageError("Ray deals out the GPUs itself", hint="--device cuda")
    if not re.fullmatch(r"auto|local|[^/\s]+:\d{1,5}", asked.ray_address, re.ASCII):
        raise UsageError(
            f"--ray-address takes auto, local or HOST:PORT, not {asked.ray_address!r:.80}",
            cause="a run is part of its cluster: start it on a node, or with `ray job submit`",
            hint="--ray-address auto",
        )
    if find_spec("ray") is None:
        raise UsageError("--engine ray needs Ray", hint="pip install 'loftq[ray]'")


@dataclass(frozen=True)
class Node:
    """One that is alive, and what it has for all tasks together."""

    id: str
    name: str
    cpus: int
    gpus: int
    memory_bytes: int

    def tasks(self, need: Need) -> int:
        """As many of these run there at once."""
        by_gpus = self.gpus if need.gpus else self.cpus
        return min(self.cpus // need.cpus, self.memory_bytes // need.memory_bytes, by_gpus)


@dataclass(frozen=True)
class Need:
    """What one task takes."""

    cpus: int
    gpus: int
    memory_bytes: int


@dataclass(frozen=True)
class Sight:
    """What a node has to see: versions by library, (size, time of change) by file, a mark."""

    versions: tuple[tuple[str, str | None], ...]
    files: tuple[tuple[Path, tuple[int, int]], ...]
    mark: Path

    def require(self) -> str:
        """Called on a node; what its processor multiplies.

        Raises:
            LoftqError: the node has something else.
        """
        for library, version in _versions():
            ours = dict(self.versions)[library]
            if version != ours:
                raise LoftqError(
                    f"{library} is {version or 'not there'}, and {ours} where the run was started",
                    hint="install the same versions on every node",
                )
        for path, stamp in self.files:
            _require_seen(path, stamp)
        if not self.mark.is_file() or not os.access(self.mark.parent, os.W_OK):
            raise LoftqError(
                f"{self.mark.parent} is not the directory that is written",
                cause="a file that was put there is not seen, or nothing may be written",
                hint="--output on a file system that all nodes share",
            )
        return _processor()


def _require_seen(path: Path, stamp: tuple[int, int]) -> None:
    hint = "a --model on a file system that all nodes share"
    try:
        found = stamp_of(path.stat())
    except OSError as error:
        raise LoftqError(f"{path} is not seen", cause=error.strerror, hint=hint) from None
    if found != stamp:
        raise LoftqError(
            f"{path} is another file", cause="its size or time of change is another one", hint=hint
        )


def _versions() -> tuple[tuple[str, str | None], ...]:
    found = hardware.versions(_LIBRARIES)
    return (("loftq", __version__), *((name, found.get(name)) for name in _LIBRARIES))


def _processor() -> str:
    """What decides the last bits of a product."""
    import torch

    return f"{torch.backends.cpu.get_cpu_capability()}, {8 * hardware.product_bytes()} bits"


class Cluster:
    """A cluster that this process is connected to.

    ``processors`` says of each node, by its name, what decides the last bits of products there.
    """

    def __init__(self) -> None:
        self.processors: dict[str, str] = {}

    def nodes(self) -> list[Node]:
        """Those that are alive now and may be given tasks."""
        import ray

        found = []
        for each in ray.nodes():
            has = each["Resources"]
            if each["Alive"] and has.get("CPU", 0) >= 1:
                name = f"{each['NodeManagerHostname']} ({each['NodeName']}, {each['NodeID'][:6]})"
                numbers = (int(has.get(kind, 0)) for kind in ("CPU", "GPU", "memory"))
                found.append(Node(each["NodeID"], name, *numbers))
        return found

    def device(self, requested: str) -> hardware.Choice:
        """Where every task computes."""
        gpus = sum(node.gpus for node in self.nodes())
        if requested == "cpu" or (requested == "auto" and not gpus):
            reason = "asked for" if requested == "cpu" else "auto: no node has a GPU"
            return hardware.Choice("cpu", reason)
        if not gpus:
            raise LoftqError("no node of the cluster has a GPU", hint="use --device cpu")
        return hardware.Choice("cuda:0", f"{requested}: the cluster has {gpus} GPUs")

    def need(self, memory_bytes: int, device: str, tasks: int) -> Need:
        """What to ask of Ray for a task: a core, or more where memory or tasks are short of cores.

        Raises:
            DoesNotFit: no node has so much memory.
        """
        one = Need(1, int(device != "cpu"), memory_bytes)
        nodes = self.nodes()
        usable = [node for node in nodes if node.tasks(one)]
        if not usable:
            most = max((node.memory_bytes for node in nodes), default=0)
            raise DoesNotFit(
                "no node of the cluster has room for a task",
                cause=f"one takes about {size(memory_bytes)}, a core{' and a GPU' * one.gpus}; "
                f"the most memory that a node gives to Ray is {size(most)}",
                hint="ray start --memory says what a node gives",
            )
        at_once = min(tasks, sum(node.tasks(one) for node in usable))
        cores = sum(node.cpus for node in usable) // at_once
        return Need(min(cores, *(node.cpus for node in usable)), one.gpus, memory_bytes)

    def require_sight(self, checkpoint: Checkpoint, directory: Path) -> Sight:
        """What every node sees, once every node has been asked.

        Raises:
            LoftqError: one cannot do a task; it says which, and why.
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        mark = directory / f".ray{TEMPORARY_SUFFIX}"
        with disk_errors(mark):
            mark.touch()
        # What is streamed from a hub is seen wherever the hub is.
        sources = (each.source for each in checkpoint.headers.values())
        files = tuple((each.path, each.stamp) for each in sources if isinstance(each, LocalFile))
        sight = Sight(_versions(), files, mark)
        look = ray.remote(num_cpus=0, max_retries=0)(_look)
        nodes = self.nodes()
        asked = {
            node.name: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
            ).remote(sight)
            for node in nodes
        }
        for name, reference in asked.items():
            try:
                found = ray.get(reference, timeout=_LOOK_SECONDS)
            except GetTimeoutError:
                raise LoftqError(
                    f"node {name} does not answer", hint="ray status; ray list nodes"
                ) from None
            except RayError as error:
                raise LoftqError(
                    f"node {name} cannot run loftq",
                    cause=str(error).strip().splitlines()[-1],
                    hint=f"pip install 'loftq[ray]=={__version__}' there",
                ) from None
            if isinstance(found, LoftqError):
                raise found.within(f"node {name}")
            self.processors[name] = found
        return sight


def _look(sight: Sight) -> str | LoftqError:
    """On a node: its processor, or what it lacks. An error that is raised would be Ray's."""
    try:
        return sight.require()
    except LoftqError as error:
        return error


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """The cluster at ``address``; `local` starts one on this machine, `auto` finds one.

    Raises:
        LoftqError: nothing answers there.
    """
    if address not in ("auto", "local"):
        _require_answer(address)
    import ray

    # Ray sets its own handler; what ends a run here is ours.
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options |= {"num_cpus": hardware.threads(), "include_dashboard": False}
    try:
        ray.init(address, **options)
    except Exception as error:
        raise LoftqError(
            "there is no Ray cluster to be found"
            if address == "auto"
            else f"Ray at {address} cannot be used",
            cause=first_line(error),
            hint="ray start --head on this machine, or --ray-address local",
        ) from error
    finally:
        if main:
            signal.signal(signal.SIGTERM, handler)
    try:
        yield Cluster()
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise LoftqError(
            f"nothing answers at --ray-address {address}",
            cause=first_line(error),
            hint="the address is the one that `ray start --head` printed, port and all",
        ) from None
