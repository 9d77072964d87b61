"""How long a run would take on more workers: a simulation, from the seconds of one that was made.

    loftq quantize --model MODEL --output OUT
    python -m tests.benchmarks.scaling OUT

A task is an output file. It takes what its layers took, and its share, by bytes, of what else the
run did with tasks: reading, writing, copying. As the engines do, whoever is free takes the next
one. Every worker is as fast as the process that was measured, whatever it shares with others, disk
and memory above all; so this is the most that the division into tasks allows.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Sequence
from pathlib import Path

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128)


def seconds_of_tasks(directory: Path) -> dict[str, float]:
    """What each weight file took, in the order in which they were made."""
    report = json.loads((directory / "loftq_report.json").read_text("utf-8"))
    layers, files = report["results"]["layers"], report["results"]["files"]
    sizes = {
        each["name"]: each["bytes"]
        for each in files
        if "/" not in each["name"] and each["name"].endswith(".safetensors")
    }
    computed = dict.fromkeys(sizes, 0.0)
    holders = files_of_modules(directory)
    for layer in layers:
        # The index names tensors as the checkpoint does, the report modules as the model class.
        parts = layer["name"].split(".")
        names = (".".join(parts[start:]) for start in range(len(parts)))
        holder = next((holders[name] for name in names if name in holders), min(sizes))
        computed[holder] += layer["seconds"]
    rest = max(report["timings_seconds"]["tasks"] - sum(computed.values()), 0.0)
    whole = sum(sizes.values())
    return {name: computed[name] + rest * size / whole for name, size in sorted(sizes.items())}


def files_of_modules(directory: Path) -> dict[str, str]:
    """By the index; empty if there is one file alone."""
    index = directory / "model.safetensors.index.json"
    weights: dict[str, str] = {}
    if index.exists():
        weights = json.loads(index.read_text("utf-8"))["weight_map"]
    return {tensor.rpartition(".")[0]: file for tensor, file in weights.items()}


def makespan(seconds: Sequence[float], workers: int) -> float:
    """Until the last of these tasks is done, each begun by whoever is free first."""
    free = [0.0] * workers
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="what quantize wrote, in one process")
    seconds = list(seconds_of_tasks(parser.parse_args().directory).values())
    alone = sum(seconds)
    print(
        f"simulated from {len(seconds)} tasks of {min(seconds):.2f} to {max(seconds):.2f} s "
        f"({alone:.1f} s together); start and end of the run are not in it\n"
    )
    print("| workers | simulated | times as fast |\n|---:|---:|---:|")
    for workers in WORKERS:
        spent = makespan(seconds, workers)
        print(f"| {workers} | {spent:.1f} s | {alone / spent:.1f} |")
        if workers >= len(seconds):
            break


if __name__ == "__main__":
    main()
