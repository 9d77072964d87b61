"""A small quantize: some shards, an adapter in a subdirectory, a config. Run by tests that fail
single system calls of it, and as a program by tests that kill it:

    python staged_run.py OUT [--force] [--seed N] [--pause SECONDS]
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from loftq_cli.checkpoint.staging import Staging
from loftq_cli.checkpoint.writer import PlannedTensor, write_bytes_atomically, write_safetensors
from loftq_cli.containers import kind_of
from loftq_cli.containers.base import Weight
from loftq_cli.errors import LoftqError

WEIGHT = Weight("up.weight", "up", (128, 64), 3, "BF16")
# Files by their names: a weight in each of the containers, and what is left as it was.
PLANS = {
    "model-1.safetensors": kind_of("bitsandbytes", 3)("nf4", 64).planned(WEIGHT),
    "model-2.safetensors": [
        *kind_of("gptq", 3)("int", 32).planned(WEIGHT),
        PlannedTensor("norm", "BF16", (64,)),
    ],
    "loftq_init/adapter.safetensors": kind_of("compressed-tensors", 3)("int", 32).planned(WEIGHT),
}
SHARDS = list(PLANS)


def tensors(
    plan: Sequence[PlannedTensor], generator: random.Random, pause: float
) -> Iterator[tuple[str, bytes]]:
    for tensor in plan:
        time.sleep(pause)
        yield tensor.name, generator.randbytes(tensor.nbytes)


def staged_run(output: Path, *, force: bool = False, seed: int = 0, pause: float = 0) -> list[str]:
    """Write the directory, or what is missing of it; the names of the shards that were made."""
    made = []
    with Staging(output, fingerprint={"seed": seed}, force=force) as staging:
        for shard, plan in PLANS.items():
            if shard not in staging.finished:
                chunks = tensors(plan, generator := random.Random(f"{seed} {shard}"), pause)
                written = write_safetensors(staging.path(shard), plan, chunks)
                staging.record(shard, written, {"error": generator.random()})
                made.append(shard)
        errors = [staging.finished[shard].payload["error"] for shard in SHARDS]
        write_bytes_atomically(staging.path("config.json"), repr(errors).encode())
        staging.commit()
    return made


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by its relative name."""
    return {
        file.relative_to(directory).as_posix(): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.0)
    print("begun", flush=True)
    try:
        staged_run(**vars(parser.parse_args()))
    except LoftqError as error:
        print(f"{error.what}: {error.cause}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
