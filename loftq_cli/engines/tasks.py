"""Runs one task: reads its tensors one by one and quantizes what is to be quantized.

A task hands over the bytes of its output file and holds two weights at a time, the one that is
worked on and the next, or less (`estimates.Level`); what it keeps to its end are the adapters,
which are small.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from loftq_cli.checkpoint import adapter, container
from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.checkpoint.safetensors import read_pieces
from loftq_cli.checkpoint.tensors import load_rows, load_tensor, torch_dtype
from loftq_cli.engines.estimates import Level, by_rows
from loftq_cli.engines.pipeline import Chunk, Timings, read_ahead
from loftq_cli.engines.placement import to_device, with_fallback
from loftq_cli.engines.plan import PlannedLayer, Settings, Task
from loftq_cli.errors import LoftqError
from loftq_cli.models.layers import LeftTensor

if TYPE_CHECKING:
    import torch

    from loftq_cli.core.loftq import LoftqResult
    from loftq_cli.core.streamed import RowsOnDemand


@dataclass(frozen=True)
class LayerOutcome:
    """What came out for one layer: plain data that a manifest can keep.

    Errors are relative to ``norm``, the weight's Frobenius norm.
    """

    name: str
    error: float
    quantized_only_error: float
    error_curve: list[float]
    best_iteration: int
    norm: float
    seconds: float


class Progress(Protocol):
    """Whom a task tells what it is doing."""

    def start(self, name: str) -> None: ...
    def advance(self, name: str) -> None: ...


class RunningTask:
    """One task under way: iterate :meth:`chunks` to their end, then take the rest."""

    def __init__(
        self,
        task: Task,
        settings: Settings,
        checkpoint: Checkpoint,
        device: str,
        progress: Progress,
        timings: Timings,
        warn: Callable[[str], None],
        level: Level = Level.AHEAD,
    ) -> None:
        self.task = task
        self.settings = settings
        self.checkpoint = checkpoint
        self.device = device
        self.progress = progress
        self.timings = timings
        self.warn = warn
        self.level = level
        self.outcomes: list[LayerOutcome] = []
        self.adapters: list[Chunk] = []

    def chunks(self) -> Iterator[Chunk]:
        """Name and bytes of the output file's tensors; copied ones come in pieces."""
        ahead = self.level == Level.AHEAD
        for entry, W in read_ahead(self.task.entries, self._weight, self.timings, ahead=ahead):
            if isinstance(entry, PlannedLayer):
                assert W is not None
                self.progress.start(entry.layer.module)
                yield from self._quantized(entry, W)
                self.progress.advance(entry.layer.module)
            else:
                for piece in read_pieces(*self.checkpoint.tensors[entry.tensor]):
                    yield entry.tensor, bytes(piece)  # the piece's buffer is used again
            del W

    def _weight(self, entry: PlannedLayer | LeftTensor) -> torch.Tensor | RowsOnDemand | None:
        """A layer's weight. Tensors to copy are read when it is their turn, piece by piece."""
        if isinstance(entry, LeftTensor):
            return None
        stored = self.checkpoint.tensors[entry.layer.tensor]
        if self.level == Level.ROWS and self.device == "cpu" and by_rows(entry, self.settings):
            from loftq_cli.core.streamed import RowsOnDemand

            return RowsOnDemand(entry.shape, torch_dtype(stored[1]), partial(load_rows, *stored))
        return to_device(load_tensor(*stored), self.device)

    def _quantized(self, planned: PlannedLayer, W: Any) -> Iterator[Chunk]:
        from loftq_cli.core.residual import sum_of_squares

        began = time.perf_counter()
        layer = planned.layer
        if layer.transposed:
            W = W.T.contiguous()

        def fall_back() -> None:
            self.warn(f"{layer.tensor} does not fit on {self.device}: computed on the CPU")

        def work(W: torch.Tensor) -> LoftqResult:
            return initialize(W, planned, self.settings)

        try:
            result = with_fallback(work, W, self.device, fall_back)
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
            )
        )
        if planned.adapted:
            name_a, name_b = adapter.lora_names(layer.module)
            self.adapters.append((name_a, container.tensor_memory(result.lora_A)))
            self.adapters.append((name_b, container.tensor_memory(result.lora_B)))
        tensors = list(container.tensors(layer.tensor, result.quantized))
        self.timings.add("compute", began)
        yield from tensors


def initialize(W: torch.Tensor, planned: PlannedLayer, settings: Settings) -> LoftqResult:
    """The start of one layer. A layer without an adapter is quantized and no more."""
    from loftq_cli.core import loftq

    alternate = planned.adapted and settings.init == "loftq"
    result: LoftqResult = loftq.initialize(
        W,
        quantizer(settings),
        settings.rank if planned.adapted else 1,
        scaling=settings.scaling,
        iterations=settings.iterations if alternate else 0,
        svd=settings.svd,
        seed=layer_seed(settings.seed, planned.layer.module),
    )
    return result


def quantizer(settings: Settings) -> Any:
    """The way of storing weights that the settings ask for."""
    from loftq_cli.core.blockwise import BlockwiseFormat
    from loftq_cli.core.quantizers import Blockwise, Int8

    if settings.bits == 8:
        return Int8()
    return Blockwise(
        BlockwiseFormat(settings.quant_type, settings.block_size, settings.double_quant)
    )


def layer_seed(seed: int, module: str) -> int:
    """A seed for one layer that does not depend on which layers came before it."""
    digest = hashlib.sha256(f"{seed}:{module}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
