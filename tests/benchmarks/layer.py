"""The LoftQ start of one weight: PEFT's, the paper repository's way, and ours, in one run.

    python -m tests.benchmarks.layer --quick
    python -m tests.benchmarks.layer                  # all shapes; PEFT takes most of the time
    python -m tests.benchmarks.layer --device cuda

Run it on a machine that does nothing else. Every row works on the same weight; methods take turns
(A B C A B C …) so that a machine whose speed drifts does not favour one; seconds are medians. The
table it prints is Markdown.

PEFT computes on CUDA only. On the CPU the constant that says so is replaced, nothing else
(`tests/core/peft_on_cpu.py`). "Paper" is the loop of the LoftQ repository (`utils.py`): the same
bitsandbytes quantizer and a full SVD, without PEFT's diagonal matrices. "loftq" is the default of
`loftq quantize`: absmax searched for, and iterations until they stop paying; "one" is the same with
`--iterations 1`. "Floor" is for ours with bitsandbytes' own absmax and T iterations: its seconds
over what the machine allows at least.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from torch import Tensor

from loftq_cli.core.blockwise import BlockwiseFormat
from loftq_cli.core.loftq import initialize
from loftq_cli.core.quantizers import Blockwise
from tests.benchmarks.roofline import Floor, measure_floor
from tests.core import peft_on_cpu

SHAPES = [(768, 2304), (768, 3072), (2048, 2048), (4096, 4096), (4096, 11008)]
QUICK = [(768, 2304), (2048, 2048)]
ITERATIONS = 5  # of PEFT and the paper
# A peer that takes longer than this is run once, not several times.
LONG_SECONDS = 20.0
COLUMNS = (
    "weight",
    "rank",
    "PEFT s",
    "paper s",
    "one s",
    "loftq s",
    "PEFT ÷ one",
    "PEFT ÷ loftq",
    "residual PEFT",
    "one",
    "loftq",
    "÷ floor",
)


@dataclass(frozen=True)
class Case:
    """A weight with its spectrum, and what is asked for."""

    shape: tuple[int, int]
    rank: int
    spectrum: str = "low rank + noise"

    def weight(self) -> Tensor:
        """(out, in) float32: 0.02·N(0, 1), plus 0.002·(rank 128) unless it is pure noise."""
        generator = torch.Generator().manual_seed(7)
        out_features, in_features = self.shape
        W = 0.02 * torch.randn(out_features, in_features, generator=generator)
        if self.spectrum != "noise":
            left = torch.randn(out_features, 128, generator=generator)
            W += 0.002 * left @ torch.randn(128, in_features, generator=generator)
        return W


Method = Callable[[Tensor, Case], float]


def peft(W: Tensor, case: Case) -> float:
    """PEFT's `loftq_init`; gives the relative residual."""
    if W.is_cuda:
        from peft.utils.loftq_utils import loftq_init

        Q, A, B = loftq_init(W, 4, case.rank, ITERATIONS)
    else:
        Q, A, B = peft_on_cpu.loftq_init(W, 4, case.rank, ITERATIONS)
    return peft_on_cpu.relative_residual(W, Q, A, B)


def paper(W: Tensor, case: Case) -> float:
    """Quantize and full SVD in turn, as in the LoftQ repository."""
    target = W
    for _ in range(ITERATIONS):
        codes, state = bnb.functional.quantize_4bit(target, quant_type="nf4", blocksize=64)
        Q = bnb.functional.dequantize_4bit(codes, state)
        U, S, Vh = torch.linalg.svd(W - Q, full_matrices=False)
        B, A = (
            U[:, : case.rank] * S[: case.rank].sqrt(),
            S[: case.rank].sqrt()[:, None] * Vh[: case.rank],
        )
        target = W - B @ A
    return peft_on_cpu.relative_residual(W, Q, A, B)


def plain(W: Tensor, case: Case) -> float:
    """Ours with bitsandbytes' absmax and as many iterations as PEFT's."""
    quantizer = Blockwise(BlockwiseFormat("nf4", 64)).plain()
    return initialize(W, quantizer, case.rank, iterations=ITERATIONS).error


def one(W: Tensor, case: Case) -> float:
    """`loftq quantize --iterations 1`."""
    return initialize(W, Blockwise(BlockwiseFormat("nf4", 64)), case.rank, iterations=1).error


def default(W: Tensor, case: Case) -> float:
    """`loftq quantize`'s own function, as it calls it by default."""
    return initialize(W, Blockwise(BlockwiseFormat("nf4", 64)), case.rank).error


def seconds_of(method: Method, W: Tensor, case: Case) -> tuple[float, float]:
    synchronize(W)
    began = time.perf_counter()
    residual = method(W, case)
    synchronize(W)
    return time.perf_counter() - began, residual


def synchronize(W: Tensor) -> None:
    if W.is_cuda:
        torch.cuda.synchronize()


def run(
    case: Case, methods: dict[str, Method], device: str, repeats: int
) -> dict[str, tuple[float, float]]:
    """Median seconds and residual of each method."""
    W = case.weight().to(device)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    residuals: dict[str, float] = {}
    for _ in range(repeats):
        for name, method in methods.items():
            if seconds[name] and seconds[name][0] > LONG_SECONDS:
                continue
            spent, residuals[name] = seconds_of(method, W, case)
            seconds[name].append(spent)
    return {name: (statistics.median(seconds[name]), residuals[name]) for name in methods}


def cases(shapes: list[tuple[int, int]], ranks: list[int]) -> list[Case]:
    found = [Case(shape, rank) for shape in shapes for rank in ranks]
    return [*found, *(Case(shape, 64, "noise") for shape in shapes if shape == (4096, 4096))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, rank 16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", help="only these, such as 2048x2048,4096x4096")
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device = arguments.device

    name = torch.cuda.get_device_name(device) if device != "cpu" else platform.processor()
    threads = torch.get_num_threads()
    print(f"{name or platform.machine()}, {threads} threads, torch {torch.__version__}\n")
    methods: dict[str, Method] = {
        "PEFT": peft,
        "paper": paper,
        "one": one,
        "loftq": default,
        "plain": plain,
    }
    run(Case((256, 256), 16), methods, device, 1)  # what is compiled or loaded once

    floor: Floor = measure_floor(device)
    print(f"{floor}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    shapes, ranks = SHAPES, [int(rank) for rank in arguments.ranks.split(",")]
    if arguments.shapes:
        sides = [shape.split("x") for shape in arguments.shapes.split(",")]
        shapes = [(int(rows), int(columns)) for rows, columns in sides]
    chosen = cases(QUICK, [16]) if arguments.quick else cases(shapes, ranks)
    for case in chosen:
        found = run(case, methods, device, arguments.repeats)
        seconds = [spent for spent, _ in found.values()]
        residuals = [residual for _, residual in found.values()]
        floor_seconds = floor.seconds(case.shape, case.rank, ITERATIONS)
        cells = [
            f"{case.shape[0]}×{case.shape[1]}{', noise' * (case.spectrum == 'noise')}",
            str(case.rank),
            *(f"{spent:#.3g}" for spent in seconds[:4]),
            *(f"{seconds[0] / spent:.0f}" for spent in seconds[2:4]),
            *(f"{residuals[number]:.5f}" for number in (0, 2, 3)),
            f"{seconds[4] / floor_seconds:.1f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
