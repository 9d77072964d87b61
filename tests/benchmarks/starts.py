"""How near every start is to its original, and where a fine-tune from it ends: `loftq compare`.

    python -m tests.benchmarks.starts --bits 4,3,2
    python -m tests.benchmarks.starts --model DIR --text DIR/heldout.txt \\
        --calibration-text DIR/calibration.txt --bits 4,3,2
    python -m tests.benchmarks.starts --bits 4,2 --init lora,loftq-plain,loftq,calibrated \\
        --train-steps 200 --seeds 0,1,2

Options that are not its own go to `loftq compare`. The table it prints is Markdown: KL divergences,
each also as a share of that of `loftq-plain` at the same bits; or after training held-out losses,
mean and standard deviation over the seeds (a seed decides the adapter's random part and the order
of the data). `--keep` leaves compare's documents in a folder.

What is trained on is C++: headers that torch installs, which a model of Python code has not seen.
One file in ten, by the hash of its path, is not trained on but evaluated on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

RANK = "8"
# Of generated ones there are thousands, all alike.
HEADERS = ("c10", "caffe2", "ATen/core", "ATen/native", "torch/csrc")
TRAINING_BYTES, HELDOUT_BYTES = 2_000_000, 150_000


def write_headers(folder: Path) -> list[str]:
    """Two texts of C++ in `folder`, as options of `compare`."""
    import torch

    root = Path(torch.__file__).parent / "include"
    texts: dict[str, list[str]] = {"train": [], "heldout": []}
    left = {"train": TRAINING_BYTES, "heldout": HELDOUT_BYTES}
    files = [file for name in HEADERS for file in (root / name).rglob("*.h")]
    digests = {
        file: hashlib.sha256(file.relative_to(root).as_posix().encode()).digest() for file in files
    }
    for file in sorted(digests, key=lambda each: digests[each]):
        side = "heldout" if digests[file][-1] % 10 == 0 else "train"
        text = file.read_text(encoding="utf-8", errors="ignore")
        if len(text) <= left[side]:
            left[side] -= len(text)
            texts[side].append(text)
    for name, each in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(each), encoding="utf-8")
    return ["--train-text", str(folder / "train.txt"), "--text", str(folder / "heldout.txt")]


def compare(options: list[str]) -> dict[str, Any]:
    """The document of one comparison; its progress goes to this process's stderr."""
    line = [sys.executable, "-m", "loftq_cli", "compare", "--json", *options]
    found: dict[str, Any] = json.loads(subprocess.run(line, check=True, stdout=-1).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--train-steps", type=int)
    parser.add_argument("--keep", type=Path, help="folder for the documents")
    arguments, options = parser.parse_known_args()
    options += ["--ranks", RANK]
    documents = []
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.train_steps is not None:
            options += ["--train-steps", str(arguments.train_steps), *write_headers(Path(scratch))]
        for seed in arguments.seeds.split(","):
            documents.append(compare([*options, "--seed", seed]))
            if arguments.keep:
                arguments.keep.mkdir(parents=True, exist_ok=True)
                target = arguments.keep / f"seed-{seed}.json"
                target.write_text(json.dumps(documents[-1], indent=1))
    results = [document["results"] for document in documents]
    print(f"{documents[0]['model']['id']}, {results[0]['architecture']}, rank {RANK}\n")
    print(table(results, after_training=arguments.train_steps is not None))


def table(results: list[dict[str, Any]], *, after_training: bool) -> str:
    """One row a start, one column a number of bits."""
    key = "heldout_loss_after" if after_training else "kl_divergence"
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        for method in result["methods"]:
            if method[key] is not None and method["init"] != "original":
                found[method["init"]][method["bits"]].append(method[key])
    bits = sorted({each for start in found.values() for each in start}, reverse=True)
    lines = [f"| | {' | '.join(f'{each} bits' for each in bits)} |", f"|---{'|---:' * len(bits)}|"]
    for start, values in found.items():
        cells = []
        for each in bits:
            if each not in values:
                cells.append("")
            elif after_training:
                cells.append(_mean_and_spread(values[each]))
            else:
                published = found["loftq-plain"][each] if "loftq-plain" in found else None
                cells.append(_share(values[each], published))
        lines.append(f"| {start} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_and_spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def _share(values: list[float], published: list[float] | None) -> str:
    mean = statistics.mean(values)
    share = f" ({mean / statistics.mean(published):.2f})" if published else ""
    return f"{mean:#.3g}{share}"


if __name__ == "__main__":
    main()
