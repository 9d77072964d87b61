"""Digests of what the tool writes, over many settings: does a change of the code keep the bytes?

    python -m tests.digests record FILE [--quick]     before the change
    python -m tests.digests compare FILE [--quick]    after it; exit 1 and a line for what differs

Floating point differs between machines, so FILE belongs to the one it was made on. Of documents,
seconds, rates, memory and versions are left out; the rest is kept whole, so that a difference can
be shown. Run from a checkout's root, this measures that checkout. Run by hand; takes about
twenty minutes on two cores, with ``--quick`` (the small Llama alone) five.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CALIBRATED = ("qera", "qera-diagonal", "calibrated")
# Iterations are counted here and left to the layers elsewhere: so both are seen, in less time.
FEW = {
    (init, "3"): ("--iterations", "2") for init in ("loftq", "loftq-plain", "pissa", "calibrated")
}
STARTS = ("loftq", "loftq-plain", "qlora", "pissa", *CALIBRATED)
# What the machine, the moment and the installed packages decide.
VOLATILE = re.compile(
    r"(seconds|_per_second|peak_memory_bytes|environment|versions?|utc|free_bytes|^tool|rate|_gib)"
)
# Lines of a text that tell seconds, rates or the memory of this machine.
MOVING = re.compile(r"\d+(\.\d+)? ?(s|ms|tok/s|tokens/s|minutes?)\b|peak|measured in")


def settings() -> Iterator[tuple[str, ...]]:
    """Options of `quantize`, for every model below."""
    yield ("--init", "lora")
    for init in STARTS:
        for bits in ("4", "3", "2"):
            yield ("--init", init, "--bits", bits, *FEW.get((init, bits), ()))
    for init in ("loftq", "loftq-plain", "qlora", "pissa"):
        yield ("--init", init, "--bits", "8")
    for init in ("loftq", "qlora", "calibrated"):
        yield ("--init", init, "--double-quant")
    yield ("--init", "calibrated", "--bits", "2", "--double-quant")
    yield ("--init", "calibrated", "--bits", "2", "--calibration-order", "parallel")
    for init in ("loftq", "calibrated"):
        yield ("--init", init, "--bits", "4x1,2")
        yield ("--init", init, "--target-bits", "2.5")
        yield ("--init", init, "--rank-budget")
        yield ("--init", init, "--target-bits", "3", "--rank-budget", "--uniform-rank")
    yield ("--quant-type", "fp4", "--block-size", "32")
    yield ("--block-size", "128", "--lora-alpha", "32")
    yield ("--rslora", "--lora-alpha", "4", "--seed", "7")
    yield ("--svd", "exact")
    yield ("--svd", "randomized", "--iterations", "3")
    yield ("--init", "pissa", "--iterations", "1")
    yield ("--max-memory", "2GB")


# Each in front of its own `--target-modules`.
MODELS = {"llama": "q_proj,down_proj,layers.0.mlp.up_proj", "demo": "c_attn,mlp.c_proj"}


def commands(model: str) -> Iterator[tuple[str, ...]]:
    """The command lines for one model, of `quantize` and of what reads models and directories."""
    for options in settings():
        text = ("--calibration-text", "text.txt") if set(options) & set(CALIBRATED) else ()
        yield ("quantize", "-m", model, "--rank", "8", *options, *text)
    targets = ("--target-modules", MODELS[model])
    yield ("quantize", "-m", model, "--rank", "4", *targets)
    yield ("quantize", "-m", model, "--rank", "4", *targets, "--init", "pissa")
    text = ("--init", "calibrated", "--calibration-text", "text.txt")
    yield ("quantize", "-m", model, "--rank", "4", *targets, *text)
    for options in (("--bits", "2"), ("--bits", "8"), ("--rank-budget",), ("--double-quant",)):
        yield ("dry-run", "-m", model, "--rank", "8", *options)
    yield ("targets", "-m", model)
    yield ("sweep-ranks", "-m", model, "--vram", "8GB")
    yield ("sweep-ranks", "-m", model, "--error", "--ranks", "2,4,8")
    yield ("sweep-ranks", "-m", model, "--error", "--bits", "2", *targets)
    yield ("load", "-m", model, "--device", "cpu")
    yield ("verify", "--init", "pissa", "--bits", "2")
    yield ("verify", "--init", "loftq", "--bits", "8")
    yield ("verify", "--init", "calibrated", "--double-quant")
    for form in ("md", "json", "table"):
        yield ("report", form, "--init", "pissa", "--bits", "2")


def argv_of(command: tuple[str, ...], model: str) -> list[str]:
    """The arguments of `loftq`; outputs lie in a directory of the setting's own."""
    name, *options = command
    if name == "quantize":
        return [*command, "-o", output(command, model), "--json"]
    if name == "dry-run":
        return ["quantize", *options, "--dry-run", "--json"]
    if name == "verify":
        return ["verify", _written(options, model), "--json"]
    if name == "report":
        form, *rest = options
        return ["report", f"{_written(rest, model)}/loftq_report.json", "--format", form]
    return [*command, "--json"]


def _written(options: list[str], model: str) -> str:
    text = ["--calibration-text", "text.txt"] if set(options) & set(CALIBRATED) else []
    return output(("quantize", "-m", model, "--rank", "8", *options, *text), model)


def output(command: tuple[str, ...], model: str) -> str:
    return f"{model}-{hashlib.sha256(' '.join(command).encode()).hexdigest()[:12]}"


def steady(value: Any, place: str = "") -> Any:
    """A document without what no two runs share."""
    if isinstance(value, dict):
        return {
            key: steady(each, f"{place}.{key}")
            for key, each in value.items()
            if not VOLATILE.search(key) and f"{place}.{key}" != ".files.loftq_report.json"
        }
    if isinstance(value, list):
        # The README's lines are compared below: its hash has those that move in it.
        return [steady(each, place) for each in value if not _is_readme(each)]
    if isinstance(value, str):
        return "\n".join(line for line in value.split("\n") if not MOVING.search(line))
    return value


def _is_readme(value: Any) -> bool:
    return isinstance(value, dict) and value.get("name") == "README.md"


def digests(directory: Path) -> dict[str, str]:
    """Hashes of a directory's files, and of each file's tensors joined over all files."""
    found = {}
    tensors: dict[str, str] = {}
    for path in sorted(directory.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(directory).as_posix()
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            size = int.from_bytes(content[:8], "little")
            for tensor, info in json.loads(content[8 : 8 + size]).items():
                if tensor != "__metadata__":
                    first, last = (8 + size + each for each in info.pop("data_offsets"))
                    told = json.dumps(info, sort_keys=True).encode()
                    tensors[tensor] = hashlib.sha256(told + content[first:last]).hexdigest()
        if name == "loftq_report.json":
            content = json.dumps(steady(json.loads(content))["results"]["files"]).encode()
        if name == "README.md":
            content = steady(content.decode()).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    every = json.dumps(tensors, sort_keys=True).encode()
    return {**found, "tensors": hashlib.sha256(every).hexdigest()}


def in_child(work: Any) -> int:
    """Runs ``work`` in a fork that has all libraries, and gives its exit status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(argv: list[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command line."""

    def work() -> int:
        from loftq_cli.cli import main

        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        return main(argv)

    code = in_child(work)
    return code, Path("stdout").read_text("utf-8"), Path("stderr").read_text("utf-8")


def build_llama() -> int:
    """A sharded bfloat16 Llama with layers above and below what the compiled kernels take."""
    import shutil

    import torch
    import transformers

    import loftq_cli

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained("llama", max_shard_size="2MB")
    demo = Path(loftq_cli.__file__).parent / "demo"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, "llama")
    return 0


def record(models: list[str]) -> dict[str, Any]:
    """Everything, by command line."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import loftq_cli
    from loftq_cli.core import kernels  # noqa: F401

    demo = Path(loftq_cli.__file__).parent / "demo"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        assert in_child(build_llama) == 0
        Path("text.txt").write_text((demo / "calibration.txt").read_text("utf-8")[:20_000])
        for model in models:
            for command in commands(model):
                argv = argv_of(command, model)
                code, out, err = run(argv)
                result: dict[str, Any] = {"exit": code, "stderr": steady(err) if code else ""}
                if {"--json", "json"} & set(argv) and code == 0:
                    result["document"] = steady(json.loads(out))
                else:
                    result["stdout"] = steady(out)
                if command[0] == "quantize" and code == 0:
                    result["files"] = digests(Path(argv[argv.index("-o") + 1]))
                found[f"{model}: {' '.join(command)}"] = result
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """A line for every command and part that is not the same, with what is other."""
    for name in [*old, *(new.keys() - old.keys())]:
        before, after = old.get(name, {}), new.get(name, {})
        for part in sorted(before.keys() | after.keys()):
            if before.get(part) == after.get(part):
                continue
            yield f"{name}: {part}"
            texts = [
                json.dumps(each.get(part), indent=1, sort_keys=True).split("\n")
                for each in (before, after)
            ]
            lines = list(difflib.unified_diff(*texts, lineterm="", n=0))[2:12]
            yield from (line[:200] for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true", help="the small Llama alone")
    arguments = parser.parse_args()
    file = arguments.file.resolve()
    models = ["llama"] if arguments.quick else list(MODELS)
    home = Path.cwd()
    found = record(models)
    os.chdir(home)
    if arguments.task == "record":
        file.write_text(json.dumps(found, indent=1))
        failed = [name for name, result in found.items() if result["exit"]]
        print(f"{len(found)} command lines", *(f"exit not 0: {name}" for name in failed), sep="\n")
        return 0
    old = json.loads(file.read_text("utf-8"))
    old = {name: result for name, result in old.items() if name in found or not arguments.quick}
    lines = list(differences(old, found))
    print(*lines, f"{len(found)} command lines, {len(lines)} lines of differences", sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
