"""The default start of one weight in every grid: seconds and residual, beside NF4's.

    python -m tests.benchmarks.grids                  # 4096×4096, rank 64
    python -m tests.benchmarks.grids --shape 1024x1024 --device cuda

Run it on a machine that does nothing else. Grids take turns, seconds are medians.
"""

from __future__ import annotations

import argparse

import torch

from loftq_cli.containers.base import Weight
from loftq_cli.containers.bitsandbytes4 import Bitsandbytes4
from loftq_cli.containers.compressed_tensors import CompressedTensors
from loftq_cli.core.loftq import initialize
from tests.benchmarks.layer import Case, Method, run

GRIDS = {
    "NF4-64": (Bitsandbytes4("nf4", 64), 4),
    "INT8-64": (CompressedTensors("int", 64), 8),
    "INT4-32": (CompressedTensors("int", 32), 4),
    "INT4-64": (CompressedTensors("int", 64), 4),
    "INT4-128": (CompressedTensors("int", 128), 4),
    "INT3-64": (CompressedTensors("int", 64), 3),
    "INT2-64": (CompressedTensors("int", 64), 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="4096x4096")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    rows, columns = map(int, asked.shape.split("x"))
    case = Case((rows, columns), asked.rank)
    methods: dict[str, Method] = {
        name: lambda W, case, grid=grid, bits=bits: (
            initialize(W, grid.quantizer(bits), case.rank).error
        )
        for name, (grid, bits) in GRIDS.items()
    }
    run(Case((256, 256), 16), methods, asked.device, 1)  # what is compiled or loaded once
    found = run(case, methods, asked.device, asked.repeats)
    print(f"{rows}×{columns}, rank {asked.rank}, {torch.get_num_threads()} threads\n")
    print("| grid | stored bits | seconds | of NF4's | residual |\n|---|---:|---:|---:|---:|")
    for name, (grid, bits) in GRIDS.items():
        weight = Weight("X.weight", "X", case.shape, bits, "BF16")
        stored = 8 * sum(each.nbytes for each in grid.planned(weight)) / (rows * columns)
        seconds, residual = found[name]
        share = seconds / found["NF4-64"][0]
        print(f"| {name} | {stored:.3f} | {seconds:.3g} | {share:.2f} | {residual:.5f} |")


if __name__ == "__main__":
    main()
