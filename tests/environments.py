"""Other versions of transformers and PEFT: does the suite pass there, and do they load our files?

    python -m tests.environments suite DIR             # the oldest and the newest that we support
    python -m tests.environments load DIR              # what we write, in the pairs of the README
    python -m tests.environments load DIR 5.17.0+0.21.2
    python -m tests.environments extras DIR            # who else reads our files

To be run in an environment where the suite runs: `extras` by `.ci/run`, the others by hand. Every
pair of versions gets a virtual environment of its own under DIR, which lies over this one: pip
installs there what that pair needs in another version, and all else (torch, bitsandbytes, pytest)
is found here. What is there is used again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = ("5.6.0+0.18.1", "5.24.0+0.21.2")
LOADING = (
    "4.57.6+0.18.1",
    "5.6.0+0.18.1",
    "5.17.0+0.21.2",
    "5.20.2+0.21.2",
    "5.24.0+0.21.2",
)
# Where we lean on transformers and PEFT: the class on the meta device, every kind of model from
# its files to a forward pass, training, generating, merging, and the check of what was written.
SUITE = (
    "tests/models/test_architecture.py",
    "tests/models/test_kinds.py",
    "tests/models/test_finetuning.py",
    "tests/quantize/test_architectures.py",
    "tests/verify/test_quantize_verify.py",
    "tests/commands/test_generate.py",
    "tests/commands/test_load.py",
    "tests/merge/test_merge.py",
)
# transformers may compile DeBERTa's functions with what torch 2.13 calls deprecated.
QUIETLY = ("-p", "no:cacheprovider", "-W", "ignore:`torch.jit:DeprecationWarning")
# For `extras`, by their names: what is installed, and the tests that ask who reads such containers.
# gptqmodel comes without what it asks for, which would be another torch; it and others are source,
# built with what is here.
BOTH = "tests/quantize/test_integer_containers.py"
EXTRAS = {
    "compressed-tensors": (
        [["compressed-tensors==0.20.0"]],
        [
            "tests/containers/test_compressed_tensors.py",
            "tests/containers/test_ct_experts.py",
            BOTH,
        ],
    ),
    "eval": ([["lm-eval==0.4.13"]], ["tests/commands/test_compare_tasks.py"]),
    "gptq": (
        [
            ["setuptools", "wheel", "packaging"],
            ["--no-deps", "--no-build-isolation", "gptqmodel==7.7.0", "torchao==0.18.0"],
            [
                "--no-build-isolation", "compressed-tensors==0.20.0", "optimum==2.3.0", "datasets",
                "defuser", "device-smi", "logbar", "ninja", "pillow", "protobuf", "pypcre",
                "requests", "threadpoolctl", "tokenicer",
            ],
        ],
        ["tests/containers/test_gptqmodel.py", "tests/quantize/test_integer_cards.py", BOTH],
    ),
    "ray": ([["ray==2.60.0"]], ["tests/engines/test_ray.py"]),
    # What CUDA builds of torch bring: interpreted, the kernels of CUDA run here too.
    "triton": ([["triton==3.9.0"]], ["tests/core/test_triton.py", "tests/core/test_waits.py"]),
}  # fmt: skip
# What is written for `load`: options of `quantize`.
WRITTEN = ("--bits 4", "--bits 4 --quant-type fp4 --double-quant", "--bits 3", "--bits 8")

# The two lines of the README, and a step of training; nothing of `loftq_cli`.
LOADER = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[1], subfolder="loftq_init", is_trainable=True)
tokens = torch.arange(3, 35).view(1, -1)
loss = model(input_ids=tokens, labels=tokens).loss
loss.backward()
lora = [(n, p) for n, p in model.named_parameters() if "lora_" in n]
assert lora and "loftq_cli" not in sys.modules
for name, parameter in model.named_parameters():
    assert parameter.requires_grad == ("lora_" in name), name
for name, parameter in lora:
    assert parameter.grad is not None and parameter.grad.isfinite().all(), name
kinds = {type(module).__name__ for module in model.modules()}
assert kinds & {"Linear4bit", "Linear8bitLt"}, kinds
print(f"{loss.item():.4f}")
"""


def environment(under: Path, pair: str) -> Path:
    """The interpreter of an environment with this pair of versions, made unless it is there."""
    versions = dict(zip(("transformers", "peft"), pair.split("+"), strict=True))
    pins = [f"{name}=={version}" for name, version in versions.items()]
    # pip says that it disagrees with what the environment beneath needs; so it is meant.
    python = layered(under / pair, [pins])
    found = run(python, "-c", "import transformers as t, peft as p; print(t.__version__, end='+');"
                "print(p.__version__)").stdout.strip()  # fmt: skip
    assert found == pair, found
    return python


def layered(directory: Path, installs: Sequence[Sequence[str]]) -> Path:
    """The interpreter of an environment over this one, with what these arguments of pip install."""
    python = directory / "bin" / "python"
    if (directory / "complete").exists():
        return python
    venv.create(directory, with_pip=False, clear=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for arguments in installs:
        subprocess.run([python, "-m", "pip", "install", "-q", *arguments], check=True)
    (directory / "complete").touch()
    return python


def run(python: Path | str, *arguments: object) -> subprocess.CompletedProcess[str]:
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    quiet["TORCHDYNAMO_DISABLE"] = "1"  # gptqmodel compiles its kernel, for half a minute
    return subprocess.run(
        [python, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **quiet, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout if done.stdout.strip() else done.stderr).strip().splitlines()
    return lines[-1] if lines else "nothing was said"


def suite(under: Path, pairs: list[str]) -> bool:
    passed = True
    for pair in pairs:
        done = run(environment(under, pair), "-m", "pytest", "-q", *QUIETLY, *SUITE)
        passed &= done.returncode == 0
        print(f"{pair:16} {last_line(done)}")
        if done.returncode:
            print(done.stdout)
    return passed


def extras(under: Path, names: list[str]) -> bool:
    """Side by side: most of their time is downloads. What is skipped was not asked, and fails."""
    with ThreadPoolExecutor() as pool:
        return all(list(pool.map(partial(extra, under), names)))


def extra(under: Path, name: str) -> bool:
    installs, tests = EXTRAS[name]
    began = time.monotonic()
    python = layered(under / name, installs)
    installed = time.monotonic()
    version = run(python, "-c", "import torch; print(torch.__version__)").stdout.strip()
    assert version == metadata.version("torch"), f"{name} has replaced torch by {version}"
    done = run(python, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *tests)
    said, tested = last_line(done), time.monotonic()
    print(f"{name:20} installed in {installed - began:.0f} s, {tested - installed:.0f} s: {said}")
    passed = done.returncode == 0 and "skipped" not in said
    if not passed:
        print(done.stdout, done.stderr)
    return passed


def load(under: Path, pairs: list[str]) -> bool:
    passed = True
    with tempfile.TemporaryDirectory() as scratch:
        outputs = {options: Path(scratch) / str(i) for i, options in enumerate(WRITTEN)}
        for options, output in outputs.items():
            asked = ("-o", output, "--rank", 8, "--iterations", 1, *options.split())
            run(sys.executable, "-m", "loftq_cli", "quantize", *asked).check_returncode()
        for pair in pairs:
            python = environment(under, pair)
            for options, output in outputs.items():
                done = run(python, "-c", LOADER, output)
                passed &= done.returncode == 0
                said = f"loss {last_line(done)}" if not done.returncode else done.stderr
                print(f"{pair:16} {options:42} {said}", flush=True)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mode", choices=("suite", "load", "extras"))
    parser.add_argument("under", type=Path, metavar="DIR")
    parser.add_argument("pairs", nargs="*", metavar="TRANSFORMERS+PEFT|EXTRA")
    asked = parser.parse_args()
    modes = {"suite": (suite, SUPPORTED), "load": (load, LOADING), "extras": (extras, EXTRAS)}
    work, pairs = modes[asked.mode]
    sys.exit(0 if work(asked.under.resolve(), asked.pairs or list(pairs)) else 1)


if __name__ == "__main__":
    main()
