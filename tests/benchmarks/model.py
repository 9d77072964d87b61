"""A whole checkpoint, from disk to written directory: `loftq quantize`, and PEFT's way.

    python examples/make_checkpoint.py gpt2 /tmp/gpt2-shaped
    python -m tests.benchmarks.model /tmp/gpt2-shaped

Each is a process of its own, start and imports included. PEFT's way is what a script around its
`loftq_init` does: load the whole model, initialize every linear layer but the head, put Q into the
model, save both. (`get_peft_model` itself cannot be asked: it needs CUDA, and takes the wrong
orientation for GPT-2's layers.) What it saves is not quantized.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RANK, ITERATIONS = 16, 5


def peft_way(source: Path, output: Path) -> None:
    """Runs in the child process; its imports are part of what is measured."""
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers.pytorch_utils import Conv1D

    from tests.core import peft_on_cpu

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    head = model.get_output_embeddings()
    adapter = {}
    for name, module in model.named_modules():
        conv1d = isinstance(module, Conv1D)
        if module is head or not (conv1d or isinstance(module, torch.nn.Linear)):
            continue
        W = module.weight.data.T if conv1d else module.weight.data
        Q, A, B = peft_on_cpu.loftq_init(W.contiguous(), 4, RANK, ITERATIONS)
        module.weight.data = (Q.T if conv1d else Q).contiguous()
        adapter[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        adapter[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
    model.save_pretrained(output)
    save_file(adapter, output / "adapter_model.safetensors")


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--repeats", type=int, default=3, help="of loftq; PEFT's way runs once")
    parser.add_argument("--peft-way", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peft_way:
        peft_way(arguments.source, arguments.peft_way)
        return
    with tempfile.TemporaryDirectory() as scratch:
        out, peft_out = Path(scratch, "loftq"), Path(scratch, "peft")
        line = [sys.executable, "-m", "loftq_cli", "quantize", "-m", str(arguments.source)]
        line += ["-o", str(out), "--force", "--rank", str(RANK)]
        once = [*line, "--iterations", "1"]
        ours, one = (
            statistics.median(seconds(each) for _ in range(arguments.repeats))
            for each in (line, once)
        )
        module = [sys.executable, "-m", "tests.benchmarks.model", str(arguments.source)]
        theirs = seconds([*module, "--peft-way", str(peft_out)])
        totals = json.loads((out / "loftq_report.json").read_text())["results"]["totals"]
        sizes = [
            sum(file.stat().st_size for file in place.rglob("*.safetensors"))
            for place in (out, peft_out)
        ]
    print(f"| {totals['parameters']:,} parameters, rank {RANK} | seconds | PEFT ÷ it | bytes |")
    print("|---|---:|---:|---:|")
    print(f"| loftq quantize | {ours:.1f} | {theirs / ours:.1f} | {sizes[0]:,} |")
    print(f"| loftq quantize --iterations 1 | {one:.1f} | {theirs / one:.1f} | {sizes[0]:,} |")
    print(f"| PEFT's way, T = {ITERATIONS} | {theirs:.1f} | 1 | {sizes[1]:,} |")


if __name__ == "__main__":
    main()
