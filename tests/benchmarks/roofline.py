"""What this box could do at best: its rates, and the work that LoftQ needs.

The floor of a run is the larger of two times, each counted from the algorithm and not from any
implementation of it, at rates that are measured first:

    bytes       every iteration reads W once and writes the residual once (float32 in, the dtype
                of the sketches out), and each pass of the SVD reads the residual twice
    operations  every iteration but the first multiplies s·B·A (2·m·n·r) and each pass of the SVD
                R·V and Rᵀ·Y (4·m·n·k, k = rank + oversampling), one pass an iteration and one more
                at the end, which is the least that a warm-started SVD can do; and every iteration
                finds m·n codes, at the rate of values that are in cache

Small matrices, the measurement of the final error and everything that waits are not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from loftq_cli.core.blockwise import BlockwiseFormat
from loftq_cli.core.parallel import one_thread_each
from loftq_cli.core.quantizers import Blockwise

OVERSAMPLING = 8


@dataclass(frozen=True)
class Floor:
    """Measured rates of one device."""

    bytes_per_second: float
    operations_per_second: float
    sketch_bytes: int
    codes_per_second: float

    def __str__(self) -> str:
        return (
            f"measured: {self.bytes_per_second / 1e9:.1f} GB/s (copy, bytes read and written), "
            f"{self.operations_per_second / 1e9:.0f} GFLOP/s (matrix products of a 4096×4096 and a "
            f"4096×72 matrix, {'bfloat16' if self.sketch_bytes == 2 else 'float32'}), "
            f"{self.codes_per_second / 1e9:.2f} G codes/s (NF4, values in cache)"
        )

    def seconds(self, shape: tuple[int, int], rank: int, iterations: int) -> float:
        """The least time for T iterations on an m×n weight."""
        values = shape[0] * shape[1]
        passes = iterations + 1
        moved = (
            iterations * values * (4 + self.sketch_bytes) + passes * 2 * values * self.sketch_bytes
        )
        width = rank + OVERSAMPLING
        operations = (iterations - 1) * 2 * values * rank + passes * 4 * values * width
        computing = operations / self.operations_per_second
        computing += iterations * values / self.codes_per_second
        return max(moved / self.bytes_per_second, computing)


def measure_floor(device: str) -> Floor:
    """Medians of several, after a warm-up."""
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device)
    bandwidth = 2 * source.nbytes / copy
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        R = torch.randn(4096, 4096, device=device).to(dtype)
        V = torch.randn(4096, 72, device=device).to(dtype)
        rates[dtype] = 2 * 4096 * 4096 * 72 / median_seconds(lambda R=R, V=V: R @ V, device)
    fastest = max(rates, key=lambda dtype: rates[dtype])
    W = torch.randn(512, 4096, device=device)
    quantizer = Blockwise(BlockwiseFormat("nf4", 64)).plain()
    with one_thread_each():
        codes = median_seconds(quantizer.steps(W, rounded=True).quantize, device, repeats=29)
    return Floor(bandwidth, rates[fastest], fastest.itemsize, W.numel() / codes)


def median_seconds(work: Callable[[], object], device: str, repeats: int = 9) -> float:
    def once() -> float:
        began = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    return statistics.median(once() for _ in range(repeats))
