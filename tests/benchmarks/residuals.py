"""What is left of the weights of a real checkpoint: the data-free starts beside PEFT's.

    python -m tests.benchmarks.residuals DIRECTORY

Relative residuals ‖W − Q − B·A‖ / ‖W‖ of every linear layer, same rank and same bytes, the mean of
each kind. PEFT's is its `loftq_init` with T = 5, on the CPU as in `layer.py`.
Nothing is timed: it may run beside other work.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

import torch

from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.checkpoint.tensors import load_tensor
from loftq_cli.core.blockwise import BlockwiseFormat
from loftq_cli.core.loftq import initialize
from loftq_cli.core.quantizers import Blockwise
from loftq_cli.models.layers import linear_layers
from loftq_cli.models.source import read_config
from tests.core import peft_on_cpu

ITERATIONS = 5
# How a start is called here, and where its alternation begins.
STARTS = {"loftq": "zero", "pissa": "weight"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.directory)
    tensors = [info for _, info in checkpoint.tensors.values()]
    quantizer = Blockwise(BlockwiseFormat("nf4", 64))
    residuals: dict[tuple[str, int, int], list[list[float]]] = defaultdict(list)
    for layer in linear_layers(tensors, read_config(arguments.directory)).layers:
        W = load_tensor(*checkpoint.tensors[layer.tensor]).float()
        W = (W.T if layer.transposed else W).contiguous()
        Q, A, B = peft_on_cpu.loftq_init(W, 4, arguments.rank, ITERATIONS)
        found = [peft_on_cpu.relative_residual(W, Q, A, B)]
        for start in STARTS.values():
            found.append(initialize(W, quantizer, arguments.rank, start=start).error)
        kind = ".".join(part for part in layer.module.split(".") if not part.isdigit())
        residuals[kind, layer.out_features, layer.in_features].append(found)

    print(f"rank {arguments.rank}, NF4 in blocks of 64, PEFT T = {ITERATIONS}\n")
    print(f"| layer | out × in | count | PEFT | {' | '.join(STARTS)} | loftq ÷ PEFT | worst |")
    print(f"|---|---|---{'|---:' * (len(STARTS) + 3)}|")
    for (kind, rows, columns), each in sorted(residuals.items()):
        print(f"| {kind} | {rows}×{columns} | {len(each)} | {_cells(each)} |")
    every = [one for each in residuals.values() for one in each]
    print(f"| all | | {len(every)} | {_cells(every)} |")


def _cells(residuals: list[list[float]]) -> str:
    """Means of the residuals, and of the ratios of the default to PEFT's; and their largest."""
    ratios = [ours / theirs for theirs, ours, *_ in residuals]
    means = [f"{statistics.mean(column):.5f}" for column in zip(*residuals, strict=True)]
    return " | ".join([*means, f"{statistics.mean(ratios):.3f}", f"{max(ratios):.3f}"])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
