"""What a run has to work with: devices, memory, and the engine that uses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loftq_cli import hardware
from loftq_cli.engines import estimates
from loftq_cli.engines.cluster import Cluster
from loftq_cli.engines.engine import Engine
from loftq_cli.engines.in_turn import InTurn
from loftq_cli.engines.local import InThisProcess
from loftq_cli.engines.plan import Plan
from loftq_cli.engines.ray import OnRay
from loftq_cli.engines.sequence import CalibratedInputs
from loftq_cli.engines.tasks import TaskSpec
from loftq_cli.engines.workers import Workers, deal_out
from loftq_cli.record import Record
from loftq_cli.report import units

if TYPE_CHECKING:
    from loftq_cli.engines.job import Job


def choose_devices(job: Job, cluster: Cluster | None, record: Record) -> list[str]:
    """The device of each worker; of one there is nothing to tell."""
    if cluster is not None:
        shared = cluster.device(job.device)
        if job.settings.is_measured or job.settings.calibration is not None:
            hardware.resolve_device(shared.value)  # this process measures, or runs the model
        record.resolved("device", *shared)
        return [shared.value]
    chosen = hardware.resolve_devices(job.device)
    if job.memory_limit is not None and chosen[0].value != "cpu":
        chosen = [hardware.Choice("cpu", "--max-memory counts memory of the CPU")]
        record.warn("--max-memory counts memory of the CPU: the GPU is not used")
    names = [each.value for each in chosen]
    record.resolved("device", ",".join(names), chosen[0].reason)
    devices = deal_out(names, job.workers)
    if len(devices) > 1:
        reason = "one for each GPU" if job.workers is None else "asked for"
        record.resolved("workers", len(devices), reason)
    return devices


def memory_plan(
    plan: Plan, limit: int | None, workers: int, record: Record, device: str | None = None
) -> estimates.MemoryPlan:
    """How much is held at once, by the same rule for a run and for a dry run.

    A dry run has no ``device``, and says how much `--distill-steps` takes instead of refusing it.
    """
    threads = max(1, hardware.threads() // workers)
    machine = estimates.Machine(
        hardware.product_bytes(), threads, hardware.memory_bytes(), distills=device == "cpu"
    )
    memory = estimates.plan_memory(plan, limit, machine, workers)
    record.resolved("memory_plan", memory.name, memory.reason)
    return memory


def engine_of(
    spec: TaskSpec,
    plan: Plan,
    devices: Sequence[str],
    memory: estimates.MemoryPlan,
    cluster: Cluster | None,
    inputs: CalibratedInputs | None,
    record: Record,
) -> Engine:
    """Where the tasks of the plan run, with the ``inputs`` of a calibrated start."""
    below: Engine
    if cluster is not None:
        at_once = len(plan.tasks)
        if inputs is not None:
            at_once = max(Counter(map(inputs.turn, plan.layers)).values())
        below = _on_ray(cluster, spec, memory.task_bytes, at_once, record)
    elif len(devices) > 1:
        below = Workers(spec, devices)
    else:
        return InThisProcess(spec, inputs)
    return below if inputs is None else InTurn(spec, inputs, below, record)


def _on_ray(
    cluster: Cluster, spec: TaskSpec, memory_bytes: int, tasks: int, record: Record
) -> OnRay:
    need = cluster.need(memory_bytes, spec.device, tasks)
    nodes = cluster.nodes()
    at_once = sum(node.tasks(need) for node in nodes)
    record.resolved(
        "engine",
        "ray",
        f"asked for: {units.plural(len(nodes), 'node')}, {at_once} at once, each with "
        f"{units.plural(need.cpus, 'core')} and {units.size(memory_bytes)}",
    )
    return OnRay(cluster, spec, need, record)
