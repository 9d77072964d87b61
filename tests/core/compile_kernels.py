"""Compiles the CUDA kernels as they are launched, for GPUs that need not be there.

    python -m tests.core.compile_kernels          # one or two of each kernel, for one architecture
    python -m tests.core.compile_kernels --all    # every format, for two: minutes

Triton brings the assembler, and asks a driver only what to compile for. In a process of its own,
since where it interprets it does not compile. What is computed here is nothing: no kernel runs.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from loftq_cli.core import cuda_columns
from loftq_cli.core.blockwise import BlockwiseFormat
from loftq_cli.core.cuda_step import TritonSteps
from loftq_cli.core.extrapolation import Extrapolation
from loftq_cli.core.gptq import Grid
from loftq_cli.core.integers import IntegerFormat
from loftq_cli.core.layouts import Layout, layout
from loftq_cli.core.loftq import MONOTONE_MOMENTUM
from loftq_cli.core.steps import Factors

SOME = [
    (BlockwiseFormat("nf4", 64), 4096, torch.bfloat16),
    (IntegerFormat(4, 64), 4096, torch.float16),
]
ALL = [
    *(
        (BlockwiseFormat(kind, size, bits == 4, bits), 8192, dtype)
        for kind, bits in (("nf4", 4), ("fp4", 4), ("nf4", 3), ("nf4", 2))
        for size, dtype in ((32, torch.bfloat16), (256, torch.float16), (4096, torch.float32))
    ),
    *(
        (IntegerFormat(bits, size), columns, torch.bfloat16)
        for bits in (2, 3, 4, 8)
        for size, columns in ((32, 4096), (128, 4096), (None, 11008), (None, 28672))
    ),
]
compiled: dict[str, Any] = {}


def compile_only(kernel: JITFunction, grid: Any) -> Any:
    """Stands in for ``kernel[grid]``."""

    def launch(*arguments: Any, **options: Any) -> None:
        made = kernel.warmup(*arguments, grid=grid, **options)
        compiled[made.hash] = made

    return launch


def columns_of(form: Layout) -> None:
    """The column loops of calibrated starts."""
    block = torch.ones(form.block_size, 40)
    grid = Grid.of(form.levels, form.block_size, block, form.largest)
    G, part = torch.ones(64, 64), torch.ones(64, 40)
    chosen = torch.zeros(64, 40, dtype=torch.uint8)
    cuda_columns.pass_on(part, part, G, grid, chosen)
    cuda_columns.improve(part, part, G, grid, chosen)
    cuda_columns.search(block, torch.ones(form.block_size), grid, (1.0, 0.5), 1, 1e-30)


def main(everything: bool) -> None:
    JITFunction.__getitem__ = compile_only
    for architecture in (80, 90) if everything else (90,):
        fake = SimpleNamespace(
            get_current_device=partial(int, architecture),  # compiled for each once
            get_current_stream=lambda device: 0,
            get_current_target=partial(GPUTarget, "cuda", architecture, 32),
        )
        driver.set_active(fake)
        for fmt, columns, dtype in ALL if everything else SOME:
            W = torch.ones(16, columns, dtype=dtype)
            carried = Factors(torch.ones(16, 4), torch.ones(4, columns))
            ahead = Extrapolation(W, *MONOTONE_MOMENTUM)
            for search in (True, False) if everything else (True,):
                steps = TritonSteps(W, fmt, dtype, search=search)
                stored, _ = steps.quantize()
                steps.quantize(carried, stored, ahead)
                steps.remainder(stored, carried)
            columns_of(layout(fmt, (16, columns), dtype))
    for made in compiled.values():
        ptx = made.asm["ptx"]
        assert "cubin" in made.asm
        assert "fma.rn.f32" not in ptx, "contracted"
        assert "div.full" not in ptx, "an approximate division"
        assert "div.approx" not in ptx
    print(f"{len(compiled)} kernels")


if __name__ == "__main__":
    began = time.monotonic()
    main("--all" in sys.argv[1:])
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
