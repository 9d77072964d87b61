"""What all engines share, on one that loses what it is told to lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loftq_cli import quantize
from loftq_cli.checkpoint.writer import TEMPORARY_SUFFIX
from loftq_cli.engines import engine, resources
from loftq_cli.engines.engine import Lost
from loftq_cli.engines.local import InThisProcess
from loftq_cli.engines.plan import Task
from loftq_cli.engines.tasks import TaskResult, TaskSpec
from loftq_cli.errors import LoftqError
from loftq_cli.record import Progress
from tests.engines.conftest import OPTIONS
from tests.quantize.test_killed import contents


class Losing(InThisProcess):
    """Three at a time, the latest first; what of ``losses`` is begun ends unfinished."""

    slots = 3
    losses: list[str]

    def __init__(self, spec: TaskSpec, *rest: Any) -> None:
        super().__init__(spec, *rest)
        self.flying: list[Task] = []
        self.most = 0

    def submit(self, task: Task) -> None:
        self.flying.append(task)
        self.most = max(self.most, len(self.flying))

    def wait(self, progress: Progress) -> tuple[Task, TaskResult | Lost]:  # type: ignore[override]
        task = self._task = self.flying.pop()
        if task.file_name in self.losses:
            self.losses.remove(task.file_name)
            half = self._spec.output / f".{task.file_name}.12345{TEMPORARY_SUFFIX}"
            half.write_bytes(b"half")
            return task, Lost("worker 7", "killed by a test")
        return super().wait(progress)


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> list[Losing]:
    made: list[Losing] = []

    def make(*arguments: Any) -> Losing:
        made.append(Losing(*arguments))
        return made[-1]

    monkeypatch.setattr(resources, "InThisProcess", make)
    return made


SECOND, THIRD = (f"model-0000{n}-of-00009.safetensors" for n in (2, 3))


def test_each_may_be_lost_once(
    losing: list[Losing], source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    Losing.losses = [SECOND, THIRD]
    quantize(str(source), output=tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == expected
    assert [each.most for each in losing] == [3]


@pytest.mark.usefixtures("losing")
def test_lost_twice_is_an_error_that_says_where_and_the_rest_is_kept(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    Losing.losses = [SECOND, SECOND]
    with pytest.raises(LoftqError, match=SECOND) as caught:
        quantize(str(source), output=tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
    assert "worker 7, killed by a test" in str(caught.value.cause)
    assert not list(tmp_path.rglob(f"*{TEMPORARY_SUFFIX}"))
    Losing.losses = []
    quantize(str(source), output=tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == expected


def test_no_more_at_once_than_the_disk_has_room_for(
    losing: list[Losing], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Losing.losses = []
    for room, most in ((0, 1), (100_000, 2)):
        monkeypatch.setattr(engine, "free_bytes", lambda path, room=room: room)
        quantize(str(source), output=tmp_path / str(room), **OPTIONS)  # type: ignore[arg-type]
        assert losing[-1].most == most
