"""Calibrated starts in several processes: layers that do not wait for each other side by side.

Those are the layers of a block, or in sequence those of them that are given the same tensor. This
process runs the model, and one output file is made at a time. What it sees of inputs goes into
files in the directory that is written; there every layer is a task of its own for the engine below,
and becomes a small file. Once all layers of the output file are there, theirs
are joined to it. The bytes are those of a run in one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, count, groupby
from types import TracebackType
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.adapter import adapter_part
from loftq_cli.checkpoint.safetensors import read_header, read_tensor
from loftq_cli.checkpoint.tensors import tensor_memory
from loftq_cli.checkpoint.writer import PlannedTensor, disk_errors, write_safetensors
from loftq_cli.engines.engine import Engine, finished
from loftq_cli.engines.pipeline import Chunk, copied
from loftq_cli.engines.plan import GatheredInputs, Plan, PlannedLayer, Task
from loftq_cli.engines.sequence import DRIFT, MOMENTS, STREAM, CalibratedInputs
from loftq_cli.engines.tasks import TaskResult, TaskSpec
from loftq_cli.models.layers import LeftTensor
from loftq_cli.record import Progress, Record

if TYPE_CHECKING:
    from torch import Tensor


class InTurn(Engine):
    """An output file at a time, its layers on another engine."""

    slots = 1

    def __init__(
        self, spec: TaskSpec, inputs: CalibratedInputs, below: Engine, record: Record
    ) -> None:
        self._spec = spec
        self._inputs = inputs
        self._below = below
        self._record = record
        self._numbers = count()
        self._task: Task

    def __enter__(self) -> InTurn:
        self._below.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._below.__exit__(kind, error, traceback)

    @property
    def peak_memory_bytes(self) -> int:
        return self._below.peak_memory_bytes

    def submit(self, task: Task) -> None:
        self._task = task

    def wait(self, progress: Progress) -> tuple[Task, TaskResult]:
        done: dict[str, tuple[Task, TaskResult]] = {}
        for _, turn in groupby(self._task.layers, self._inputs.turn):
            gathered: list[tuple[Tensor, str]] = []
            small = [self._small(planned, gathered) for planned in turn]
            for task, result in finished(
                small, self._below, self._spec.output, self._record, progress
            ):
                (planned,) = task.layers
                done[planned.layer.module] = task, result
                self._inputs.lies_in(planned, task.file_name)
            self._remove(name for _, name in gathered)
        return self._task, self._joined(done)

    def _small(self, planned: PlannedLayer, gathered: list[tuple[Tensor, str]]) -> Task:
        """The task of one layer; moments that several share are ``gathered`` once."""
        name = f"layer-{next(self._numbers)}.safetensors"
        moments, drift = self._inputs.of(planned.layer.module)
        if moments is None:
            return Task(name, (planned,))
        file_name = next((each for seen, each in gathered if seen is moments), None)
        if file_name is None:
            cross = {} if drift is None else {DRIFT: drift.cross}
            file_name = self._gather({MOMENTS: moments, **cross})
            gathered.append((moments, file_name))
        if drift is None:
            return Task(name, (planned,), GatheredInputs((file_name,), 0.0))
        file_names = [file_name]
        if drift.stream is not None:
            file_names.append(self._gather({STREAM: drift.stream}))
            gathered.append((drift.stream, file_names[-1]))
        return Task(name, (planned,), GatheredInputs(tuple(file_names), drift.output_energy))

    def _gather(self, tensors: dict[str, Tensor]) -> str:
        name = f"inputs-{next(self._numbers)}.safetensors"
        write_safetensors(
            self._spec.output / name,
            [PlannedTensor(each, "F32", tuple(tensor.shape)) for each, tensor in tensors.items()],
            ((each, tensor_memory(tensor)) for each, tensor in tensors.items()),
        )
        return name

    def _joined(self, done: dict[str, tuple[Task, TaskResult]]) -> TaskResult:
        """The output file and its share of the adapter, of those of its layers."""
        task, output = self._task, self._spec.output
        part = adapter_part(task.file_name)
        with disk_errors(output):
            (output / part).parent.mkdir(parents=True, exist_ok=True)
        alone = Plan(self._spec.settings, (task,))
        small = [done[planned.layer.module] for planned in task.layers]
        weights = write_safetensors(
            output / task.file_name, alone.model_tensors(task), self._weights(done)
        )
        share = write_safetensors(
            output / part,
            alone.adapter_tensors(task.layers),
            chain.from_iterable(self._content(adapter_part(each.file_name)) for each, _ in small),
        )
        for planned in task.layers:
            self._inputs.lies_in(planned, task.file_name)
        names = [each.file_name for each, _ in small]
        self._remove([*names, *map(adapter_part, names)])
        results = [result for _, result in small]
        return TaskResult(
            [outcome for result in results for outcome in result.outcomes],
            {part: share, task.file_name: weights},
            [tensor for result in results for tensor in result.on_cpu],
            {
                stage: sum(result.seconds[stage] for result in results)
                for stage in (results[0].seconds if results else ())
            },
            self._spec.device,
        )

    def _weights(self, done: dict[str, tuple[Task, TaskResult]]) -> Iterator[Chunk]:
        for entry in self._task.entries:
            if isinstance(entry, LeftTensor):
                yield from copied(entry.tensor, *self._spec.checkpoint.tensors[entry.tensor])
            else:
                yield from self._content(done[entry.layer.module][0].file_name)

    def _content(self, name: str) -> Iterator[Chunk]:
        header = read_header(self._spec.output / name)
        for tensor, info in header.tensors.items():
            yield tensor, read_tensor(header, info)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            path = self._spec.output / name
            with disk_errors(path):
                path.unlink(missing_ok=True)
