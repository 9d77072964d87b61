"""How near every start is to its original, and where a fine-tune from it ends: `loftq compare`.

    python -m tests.benchmarks.starts --bits 4,3,2
    python -m tests.benchmarks.starts --model DIR --text DIR/heldout.txt \\
        --calibration-text DIR/calibration.txt --bits 4,3,2
    python -m tests.benchmarks.starts --bits 4,2 --train-steps 200 --seeds 3

Options that are not its own go to `loftq compare`. The table it prints is Markdown: KL divergences,
each also as a share of that of `loftq-plain` at the same bits; or with training the held-out losses
of every start at its best learning rate, means over the seeds, the last with their standard
deviation (a seed decides the adapter's random part and the order of the data). `--keep` leaves
compare's document in a file.

What is trained on is C++: headers that torch installs, which a model of Python code has not seen.
One file in ten, by the hash of its path, is not trained on but evaluated on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
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
    parser.add_argument("--train-steps", type=int)
    parser.add_argument("--keep", type=Path, help="file for the document")
    arguments, options = parser.parse_known_args()
    options += ["--ranks", RANK]
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.train_steps is not None:
            options += ["--train-steps", str(arguments.train_steps), *write_headers(Path(scratch))]
        document = compare(options)
    if arguments.keep:
        arguments.keep.write_text(json.dumps(document, indent=1))
    print(report(document))


def report(document: dict[str, Any]) -> str:
    results = document["results"]
    table = _distances if results["settings"]["train_steps"] is None else _losses
    title = f"{document['model']['id']}, {results['architecture']}, rank {RANK}"
    return "\n".join(
        [title, "", *table(results["methods"][1:]), "", results["verdict"]["sentence"]]
    )


def _distances(methods: list[dict[str, Any]]) -> Iterator[str]:
    """One row a start, one column a number of bits."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for each in methods:
        if each["kl_divergence"] is not None:
            found[each["init"]][each["bits"]] = each["kl_divergence"]
    bits = sorted({each for start in found.values() for each in start}, reverse=True)
    yield f"| | {' | '.join(f'{each} bits' for each in bits)} |"
    yield f"|---{'|---:' * len(bits)}|"
    published = found.get("loftq-plain", {})
    for start, values in found.items():
        cells = [_share(values.get(each), published.get(each)) for each in bits]
        yield f"| {start} | {' | '.join(cells)} |"


def _share(value: float | None, published: float | None) -> str:
    if value is None:
        return ""
    return f"{value:#.3g}" + (f" ({value / published:.2f})" if published else "")


def _losses(methods: list[dict[str, Any]]) -> Iterator[str]:
    yield "| bits | start | learning rate | before | at a quarter | after |"
    yield "|---:|---|---:|---:|---:|---:|"
    for each in methods:
        if each["heldout_loss_after"] is None:
            yield f"| {each['bits']} | {each['init']} | diverged | | | |"
            continue
        rate = f"{each['learning_rate']:g}" + ("*" if each["rate_at_end"] else "")
        losses = [each[f"heldout_loss_{name}"] for name in ("before", "quarter", "after")]
        cells = [f"{loss:.3f}" for loss in losses]
        if each["heldout_loss_spread"] is not None:
            cells[-1] += f" ± {each['heldout_loss_spread']:.3f}"
        yield f"| {each['bits']} | {each['init']} | {rate} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
