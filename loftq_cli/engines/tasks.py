"""Runs one task: reads its tensors one by one and quantizes what is to be quantized.

A task holds two weights at a time, the one that is worked on and the next, or less
(`estimates.py`); what it keeps to its end are the adapters, which are small.

What goes into a task and what comes out of it is plain data that can be pickled, so a task may run
in any process that sees the checkpoint's files, or their hub, and the output directory.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint import adapter
from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.checkpoint.tensors import tensor_memory
from loftq_cli.checkpoint.writer import WrittenFile, disk_errors, write_safetensors
from loftq_cli.engines.pipeline import Chunk, Timings, copied, read_ahead, write_behind
from loftq_cli.engines.placement import read_weight, with_fallback
from loftq_cli.engines.plan import Plan, PlannedLayer, Task
from loftq_cli.engines.sequence import LayerInputs, StoredInputs
from loftq_cli.engines.settings import Settings
from loftq_cli.errors import LoftqError
from loftq_cli.libraries import importing
from loftq_cli.models.layers import LeftTensor, LinearLayer
from loftq_cli.record import Progress
from loftq_cli.starts import QLORA

if TYPE_CHECKING:
    import torch

    from loftq_cli.core.input_moments import Drift
    from loftq_cli.core.loftq import LoftqResult


@dataclass(frozen=True)
class LayerOutcome:
    """What came out for one layer: plain data that a manifest can keep.

    Errors are relative to ``norm``, the weight's Frobenius norm; those of the outputs, known after
    a calibration, to ``output_norm``, the root mean square of the layer's output vectors.
    """

    name: str
    error: float
    quantized_only_error: float | None
    error_curve: list[float]
    best_iteration: int
    norm: float
    seconds: float
    output_error: float | None = None
    quantized_only_output_error: float | None = None
    output_norm: float | None = None
    backbone_error: float | None = None


@dataclass(frozen=True)
class TaskSpec:
    """What all tasks of a run have in common. ``output`` is the directory they write into."""

    settings: Settings
    checkpoint: Checkpoint
    output: Path
    device: str
    ahead: bool = True  # the next layer is read while one is worked on


@dataclass(frozen=True)
class TaskResult:
    """What one task did.

    Attributes:
        outcomes: what came out for its layers, in the task's order.
        files: what it wrote, by path below the output directory; the weights come last.
        on_cpu: tensors for which the ``device`` had no room.
        seconds: spent on reading, computing and writing. They overlap.
    """

    outcomes: list[LayerOutcome]
    files: dict[str, WrittenFile] = field(default_factory=dict)
    on_cpu: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    device: str = "cpu"


def run_task(
    task: Task,
    spec: TaskSpec,
    inputs: LayerInputs | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """Writes the task's weights, and its share of the adapter beside them.

    Args:
        inputs: asked for each layer of a calibrated start, in the task's order, and told of it;
            unless the task has those of its layer.

    Raises:
        LoftqError: a tensor cannot be read or quantized, or the files cannot be written. A file is
            there whole or not at all.
    """
    if task.inputs is not None:
        inputs = StoredInputs(spec.output, task.inputs)
    running = _RunningTask(task, spec, inputs, progress or Progress())
    part = adapter.adapter_part(task.file_name)
    with disk_errors(spec.output):
        (spec.output / part).parent.mkdir(parents=True, exist_ok=True)
    alone = Plan(spec.settings, (task,))
    weights = write_behind(
        spec.output / task.file_name, alone.model_tensors(task), running.chunks(), running.timings
    )
    share = write_safetensors(
        spec.output / part, alone.adapter_tensors(task.layers), running.adapters
    )
    return TaskResult(
        running.outcomes,
        {part: share, task.file_name: weights},
        running.on_cpu,
        running.timings.seconds,
        spec.device,
    )


@dataclass
class _RunningTask:
    """One task under way: iterate :meth:`chunks` to their end, then take the rest."""

    task: Task
    spec: TaskSpec
    inputs: LayerInputs | None
    progress: Progress
    timings: Timings = field(default_factory=Timings)
    outcomes: list[LayerOutcome] = field(default_factory=list)
    adapters: list[Chunk] = field(default_factory=list)
    on_cpu: list[str] = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        return self.spec.settings

    def chunks(self) -> Iterator[Chunk]:
        """Name and bytes of the output file's tensors; copied ones come in pieces."""
        ahead = self.spec.ahead
        for entry, W in read_ahead(self.task.entries, self._weight, self.timings, ahead=ahead):
            if isinstance(entry, LeftTensor):
                yield from copied(entry.tensor, *self.spec.checkpoint.tensors[entry.tensor])
                continue
            self.progress.start(entry.layer.module)
            if W is None:
                self._keep_plain_adapter(entry)
                tensor = entry.layer.tensor
                yield from copied(tensor, *self.spec.checkpoint.tensors[tensor])
            else:
                yield from self._quantized(entry, W)
            self.progress.advance(entry.layer.module)
            del W

    def _weight(self, entry: PlannedLayer | LeftTensor) -> torch.Tensor | None:
        """A layer's weight. Tensors to copy are read when it is their turn, piece by piece."""
        if isinstance(entry, LeftTensor) or not self.settings.container.quantizes:
            return None
        return read_weight(self.spec.checkpoint, entry.layer, self.spec.device)

    def _quantized(self, planned: PlannedLayer, W: torch.Tensor) -> Iterator[Chunk]:
        from loftq_cli.core.residual import sum_of_squares

        _warm_up(self.settings, planned.adapted, planned.bits, W.dtype, W.device)
        began = time.perf_counter()
        layer = planned.layer
        seen = (None, None) if self.inputs is None else self.inputs.of(layer.module)

        try:
            result = with_fallback(
                lambda W: initialize(W, planned, self.settings, *seen),
                W,
                self.spec.device,
                lambda: self.on_cpu.append(layer.tensor),
            )
        except LoftqError as error:
            raise error.within(layer.tensor) from error
        self.outcomes.append(
            LayerOutcome(
                layer.module,
                result.error,
                result.quantized_only_error,
                result.errors,
                result.best_iteration,
                math.sqrt(sum_of_squares(W)),
                time.perf_counter() - began,
                result.output_error,
                result.quantized_only_output_error,
                result.output_norm,
                result.backbone_error,
            )
        )
        stored = None
        if planned.adapted:
            stored = self._keep_adapter(planned, result.lora_A, result.lora_B)
        if self.inputs is not None:
            self.inputs.keep(layer.module, result.quantized, stored)
        tensors = list(self.settings.container.tensors(layer.tensor, result.quantized))
        self.timings.add("compute", began)
        yield from tensors

    def _keep_plain_adapter(self, planned: PlannedLayer) -> None:
        """LoRA's own start, for a layer that stays as it is."""
        from loftq_cli.core.loftq import plain_adapter

        module = planned.layer.module
        self.outcomes.append(LayerOutcome(module, 0.0, 0.0, [], 0, 1.0, 0.0))
        if planned.adapted:
            seed = layer_seed(self.settings.seed, module)
            self._keep_adapter(planned, *plain_adapter(planned.shape, planned.rank, seed))

    def _keep_adapter(
        self, planned: PlannedLayer, A: torch.Tensor, B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps A and B for the task's end; as they lie in the file then."""
        import torch

        from loftq_cli.core.loftq import plain_adapter

        module = planned.layer.module
        if planned.padding:
            # B is zero there, and A is not, so that the padding learns as any LoRA does.
            seed = layer_seed(self.settings.seed, f"{module} padding")
            more_A, more_B = plain_adapter(planned.shape, planned.padding, seed)
            A, B = torch.cat((A.cpu(), more_A)), torch.cat((B.cpu(), more_B), dim=1)
        dtype = getattr(torch, self.settings.adapter_dtype)
        A, B = (factor.to("cpu", dtype).contiguous() for factor in (A, B))
        for name, factor in zip(adapter.lora_names(module), (A, B), strict=True):
            self.adapters.append((name, tensor_memory(factor)))
        return A, B


def initialize(
    W: torch.Tensor,
    planned: PlannedLayer,
    settings: Settings,
    input_moments: torch.Tensor | None = None,
    drift: Drift | None = None,
) -> LoftqResult:
    """The start of one layer; ``input_moments`` (in × in) and ``drift`` where it needs them."""
    import torch

    start, rank = settings.start, planned.rank
    # Of some experts no inputs can be seen.
    unseen = input_moments is None and planned.layer.expert
    if unseen or not (planned.adapted or start.needs_moments):
        start, rank = QLORA, 1  # quantized and no more
    given: dict[str, Any] = {}
    if start.needs_moments:
        given["input_moments"] = None if input_moments is None else input_moments.to(W.device)
        if drift is not None:
            given["drift"] = drift
    if start.iterates:
        given["iterations"] = settings.iterations
    if start.svd != "own":
        given["svd"] = settings.svd if start.svd == "any" else start.svd
    result: LoftqResult = start.load()(
        W=W,
        quantizer=settings.quantizer(planned.bits),
        rank=rank,
        scaling=settings.scaling,
        adapter_dtype=getattr(torch, settings.adapter_dtype),
        seed=layer_seed(settings.seed, planned.layer.module),
        **start.arguments,
        **given,
    )
    return result


@cache
def _warm_up(
    settings: Settings, adapted: bool, bits: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Starts a small weight, once in a process.

    What is imported and compiled for all layers would be in the seconds of the first one.
    """
    import torch

    width = max(256, settings.block_size)
    W = torch.randn(256, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = LinearLayer("", "", 256, width, transposed=False, dtype="")
    planned = PlannedLayer(layer, bits, 8 if adapted else 0)
    # Out of memory the layers go to the CPU.
    with importing(), suppress(torch.OutOfMemoryError):
        initialize(W.to(device), planned, replace(settings, iterations=2), torch.eye(width))


def layer_seed(seed: int, module: str) -> int:
    """A seed for one layer that does not depend on which layers came before it."""
    digest = hashlib.sha256(f"{seed}:{module}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
