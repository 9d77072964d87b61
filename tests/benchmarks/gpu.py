"""What `gpu.sh` runs: it says what that needs, and where the files go.

Every row of the table is one run after a small one, which compiles and loads what the process does
once; on a GPU the runs differ by a few percent. The floor counts the bytes and operations of the
alternation at the rates of this device (`roofline.py`), as many iterations as were run, without the
search for absmax. PEFT runs five iterations. Calibrated starts minimize another error: theirs is
that of the outputs, beside what plain quantization leaves of those.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq_cli.core.blockwise import BlockwiseFormat
from loftq_cli.core.calibrated import initialize_calibrated
from loftq_cli.core.loftq import initialize
from loftq_cli.core.quantizers import Blockwise
from tests.benchmarks.layer import Case, peft, synchronize
from tests.benchmarks.roofline import Floor, measure_floor

SHAPES = [(4096, 4096), (4096, 11008), (768, 2304)]
TESTS = [
    "tests/core/test_triton.py",
    "tests/core/test_waits.py",
    "tests/core/test_calibrated.py",
    "tests/quantize/test_placement.py",
]
COLUMNS = ("what", "seconds", "PEFT ÷ it", "error", "÷ floor", "besides")
QUANTIZER = Blockwise(BlockwiseFormat("nf4", 64))


@dataclass(frozen=True)
class Run:
    """What is asked for, and when it must be over."""

    device: str
    tiny: bool
    work: Path
    end: float
    rows: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, *cells: str) -> None:
        """A row of the table; also at once, for those who wait."""
        self.rows.append((*cells, *[""] * (len(COLUMNS) - len(cells))))
        print(" | ".join(cell for cell in cells if cell), file=sys.stderr, flush=True)

    def child(self, *command: str) -> tuple[float, str]:
        """Seconds and stdout of a Python process."""
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=max(self.left, 1)
        )
        if done.returncode:
            raise RuntimeError((done.stderr.strip() or done.stdout.strip())[-2000:])
        return time.monotonic() - began, done.stdout


def part(run: Run, what: str, work: Callable[..., object], *arguments: Any) -> None:
    """A part that fails, or has no time left, is a row that says so: the others still run."""
    try:
        if run.left < 0:
            raise TimeoutError
        work(run, *arguments)
    except (TimeoutError, subprocess.TimeoutExpired):
        run.say(what, "", "", "", "", "left out: no time was left")
    except Exception as error:
        print(f"{what}: {error}", file=sys.stderr)
        run.say(what, "", "", "", "", f"FAILED: {str(error).strip().splitlines()[-1]:.120}")


def gpu_tests(run: Run) -> None:
    # Kernels are compiled for each format, a process each.
    marker = ["-m", "not gpu"] if run.device == "cpu" else ["-m", "gpu", "-n", "8"]
    tests = TESTS[:2] if run.device == "cpu" else TESTS
    command = ["-m", "pytest", "-q", "--dist", "worksteal", "-p", "no:cacheprovider"]
    command += ["-p", "no:benchmark"]  # where it is installed, it warns beside xdist
    spent, said = run.child(*command, *marker, *tests)
    run.say("tests of the kernels", f"{spent:.1f}", "", "", "", said.strip().splitlines()[-1])


def moments(in_features: int, device: str) -> Tensor:
    """Of inputs whose neighbours are alike and whose sizes differ."""
    generator = torch.Generator(device).manual_seed(3)
    X = torch.randn(in_features + 1024, in_features, generator=generator, device=device)
    X[:, 1:] += 0.8 * X[:, :-1]
    X *= torch.linspace(0, 3, in_features, device=device).exp()
    return X.t() @ X / X.shape[0]


def layers(run: Run, shape: tuple[int, int], rank: int, floor: Floor) -> None:
    """PEFT, one iteration, the default and a calibrated start of one weight."""
    case = Case(shape, rank)
    W = case.weight().to(run.device)
    G = moments(shape[1], run.device)
    theirs, residual = timed(W, lambda: peft(W, case))
    name = f"{shape[0]}×{shape[1]}, rank {rank}"
    run.say(f"{name}: PEFT", f"{theirs:.3f}", "1", f"{residual:.5f}")
    for method, start in (
        ("one iteration", lambda: initialize(W, QUANTIZER, rank, iterations=1)),
        ("default", lambda: initialize(W, QUANTIZER, rank)),
        ("calibrated", lambda: initialize_calibrated(W, G, QUANTIZER, rank)),
    ):
        spent, found = timed(W, start)
        least, error, besides = "", found.error, f"{len(found.errors)} iterations"
        if found.output_error is None:
            least = f"{spent / floor.seconds(shape, rank, len(found.errors)):.1f}"
        else:
            error = found.output_error
            besides += f", of the outputs; plain {found.quantized_only_output_error:.5f}"
        ratio = f"{theirs / spent:.1f}"
        run.say(f"{name}: {method}", f"{spent:.4f}", ratio, f"{error:.5f}", least, besides)


def timed(W: Tensor, work: Callable[[], Any]) -> tuple[float, Any]:
    synchronize(W)
    began = time.perf_counter()
    found = work()
    synchronize(W)
    return time.perf_counter() - began, found


def warm_up(run: Run, rank: int) -> None:
    """All that is compiled or loaded once."""
    case = Case((256, 256), rank)
    W = case.weight().to(run.device)
    peft(W, case)
    initialize_calibrated(W, moments(256, run.device), QUANTIZER, rank)
    initialize(W, QUANTIZER, rank)


def checkpoint(run: Run, rank: int) -> None:
    """Made, quantized, loaded, trained: each a process of its own, imports included."""
    shape = "llama-tiny" if run.tiny else "llama-7b"
    source, output = run.work / shape, run.work / "quantized"
    made, _ = run.child("examples/make_checkpoint.py", shape, str(source), "--device", run.device)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    run.say(f"{shape}: made", f"{made:.1f}", "", "", "", f"{size / 1e9:.2f} GB")
    command = ["-m", "loftq_cli", "quantize", "-m", str(source), "-o", str(output)]
    spent, _ = run.child(*command, "--rank", str(rank), "--device", run.device)
    report = json.loads((output / "loftq_report.json").read_text("utf-8"))
    stages = ", ".join(f"{name} {s:.1f}" for name, s in report["timings_seconds"].items())
    error = report["results"]["totals"]["weight_error_relative"]
    run.say(f"{shape}: quantize, rank {rank}", f"{spent:.1f}", "", f"{error:.5f}", "", stages)
    _, said = run.child(
        "-m", "tests.benchmarks.gpu", "--train", "--device", run.device, str(output)
    )
    trained = json.loads(said.strip().splitlines()[-1])
    run.say(f"{shape}: loaded", f"{trained['load']:.1f}", "", "", "", "transformers and peft alone")
    besides = "{tokens} tokens a step, loss {first:.3f} to {last:.3f}, peak {peak:.2f} GB"
    run.say(f"{shape}: a step of training", f"{trained['step']:.3f}", "", "", "",
            besides.format(**trained))  # fmt: skip


def train(directory: Path, device: str) -> None:
    """Loads what was written as a user would, trains a few steps, and prints figures as JSON."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    began = time.monotonic()
    base = AutoModelForCausalLM.from_pretrained(directory, device_map={"": device})
    model = PeftModel.from_pretrained(base, directory, subfolder="loftq_init", is_trainable=True)
    loaded = time.monotonic() - began
    tokens = torch.randint(0, base.config.vocab_size, (1, 512 if device != "cpu" else 32))
    tokens = tokens.to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4)
    losses, ends = [], []
    for _ in range(6):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        ends.append(time.monotonic())
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else 0
    figures = {
        "load": loaded,
        "step": (ends[-1] - ends[0]) / (len(ends) - 1),
        "first": losses[0],
        "last": losses[-1],
        "tokens": tokens.numel(),
        "peak": peak / 1e9,
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script itself")
    parser.add_argument("--minutes", type=float, default=5.8, help="what is not done then is not")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("work", type=Path, help="an empty directory")
    asked = parser.parse_args()
    if asked.train:
        train(asked.work, asked.device)
        return
    if asked.device != "cpu" and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --device cpu --tiny tries the script itself")
    end = time.monotonic() + 60 * asked.minutes
    run = Run(asked.device, asked.tiny, asked.work, end)
    rank = 8 if run.tiny else 64
    part(run, "warm-up", warm_up, rank)
    floor = measure_floor(run.device)
    for shape in [(128, 192)] if run.tiny else SHAPES:
        part(run, f"{shape[0]}×{shape[1]}", layers, shape, rank, floor)
    if run.device != "cpu":
        torch.cuda.empty_cache()
    part(run, "checkpoint", checkpoint, rank)
    part(run, "tests of the kernels", gpu_tests)
    card = "CPU" if run.device == "cpu" else torch.cuda.get_device_name(run.device)
    print(f"{card}, torch {torch.__version__}, {floor}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in run.rows:
        print(f"| {' | '.join(row)} |")
    sys.exit(any("FAILED" in row[-1] for row in run.rows))


if __name__ == "__main__":
    main()
