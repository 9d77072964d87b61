"""A task is a function of plain data: any process that sees the files can run it."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.engines import tasks
from loftq_cli.engines.plan import Plan, make_plan
from loftq_cli.engines.sequence import CalibratedInputs
from loftq_cli.engines.settings import Settings
from loftq_cli.engines.tasks import TaskResult, TaskSpec, run_task
from loftq_cli.errors import LoftqError
from loftq_cli.models.layers import linear_layers
from loftq_cli.models.source import read_config
from loftq_cli.record import Progress
from tests.battery import BATTERY
from tests.forks import FORKS


@pytest.fixture
def spec(tmp_path: Path) -> TaskSpec:
    BATTERY["llama"].build(dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    (tmp_path / "here").mkdir()
    settings = Settings(init="qera", rank=4, lora_alpha=8)
    checkpoint = open_checkpoint(tmp_path / "source")
    return TaskSpec(settings, checkpoint, tmp_path / "here", "cpu")


def plan_of(spec: TaskSpec) -> Plan:
    infos = [info for _, info in spec.checkpoint.tensors.values()]
    config = read_config(spec.checkpoint.directory)
    return make_plan(linear_layers(infos, config), spec.settings)


class Moments(dict[str, torch.Tensor]):
    """A calibration that has been."""

    def knows(self, module: str) -> bool:
        return module in self

    def moments(self, module: str) -> torch.Tensor:
        return self[module]

    def drift(self, module: str) -> None:
        return None


def test_another_process_writes_the_same_bytes(spec: TaskSpec, tmp_path: Path) -> None:
    plan = plan_of(spec)
    (task,) = plan.tasks
    moments = Moments()
    for layer in plan.layers:
        x = torch.randn(256, layer.layer.in_features, generator=torch.Generator().manual_seed(1))
        moments[layer.layer.module] = x.T @ x / len(x)
    inputs = CalibratedInputs(moments)  # type: ignore[arg-type]
    there = replace(spec, output=tmp_path / "there")
    there.output.mkdir()
    with ProcessPoolExecutor(1, mp_context=FORKS) as pool:
        other = pool.submit(run_task, task, there, inputs)
        ours, theirs = run_task(task, spec, inputs), other.result()
        # An error arrives as what it is, with the name of the tensor.
        moments["model.layers.0.mlp.up_proj"] *= float("nan")
        failed = pool.submit(run_task, task, there, inputs).exception()
    assert isinstance(failed, LoftqError)
    assert "model.layers.0.mlp.up_proj" in failed.what
    assert ours.files == theirs.files
    for name in ours.files:
        assert (spec.output / name).read_bytes() == (there.output / name).read_bytes()
    assert steady(ours) == steady(theirs)
    assert {each.name for each in ours.outcomes} == set(moments)
    assert not ours.on_cpu
    assert set(theirs.seconds) == {"read", "compute", "write"}


def steady(result: TaskResult) -> list[object]:
    return [replace(each, seconds=0.0) for each in result.outcomes]


def test_a_task_tells_its_progress_and_needs_nobody_to_hear_it(spec: TaskSpec) -> None:
    told: list[tuple[str, str]] = []

    class Remembering(Progress):
        def start(self, name: str) -> None:
            told.append(("start", name))

        def advance(self, name: str = "") -> None:
            told.append(("advance", name))

    spec = replace(spec, settings=Settings(init="lora", bits=16, rank=4, lora_alpha=8))
    plan = plan_of(spec)
    (task,) = plan.tasks
    run_task(task, spec, progress=Remembering())
    modules = [planned.layer.module for planned in plan.layers]
    assert told == [(what, module) for module in modules for what in ("start", "advance")]


def test_no_layers_seconds_hold_what_happens_once(
    spec: TaskSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only starts of layers move, the first of them in a process by an hour."""
    now = [0.0]
    starts = []
    real = tasks.initialize

    def initialize(*arguments: Any) -> Any:
        now[0] += 1 if starts else 3600
        starts.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(tasks.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(tasks, "initialize", initialize)
    tasks._warm_up.cache_clear()
    spec = replace(spec, settings=Settings(rank=4, lora_alpha=8, iterations=1))
    (task,) = plan_of(spec).tasks
    outcomes = run_task(task, spec).outcomes
    assert [each.seconds for each in outcomes] == [1.0] * len(outcomes)
    assert len(starts) == len(outcomes) + 1
