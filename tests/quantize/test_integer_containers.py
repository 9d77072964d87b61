"""Directories in the containers of integers: written, foreseen to the byte, and proved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loftq_cli.checkpoint.safetensors import read_header
from tests.battery import BATTERY
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    BATTERY["llama"].build(dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("container", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("bits", ["3", "8x1,2"])
def test_what_is_written_was_foreseen_and_is_proved(
    loftq: Loftq, source: Path, container: str, bits: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ("quantize", "-m", source, "--container", container, "--bits", bits, "--rank", 4,
             "--iterations", 1, "--block-size", 32, "--json")  # fmt: skip
    foreseen = json.loads(loftq(*asked, "--dry-run").out)["results"]
    done = loftq(*asked, "-o", out)
    assert done.code == 0, done.err
    results = json.loads(done.out)["results"]
    assert results["settings"]["container"] == container
    header = read_header(out / "model.safetensors")
    assert sum(info.nbytes for info in header.tensors.values()) == results["totals"]["output_bytes"]
    for name in ("output_bytes", "adapter_bytes", "stored_bits"):
        assert foreseen["totals"][name] == results["totals"][name]
    proved = loftq("verify", out, "--json")
    assert proved.code == 0, proved.err
    statuses = {test["name"]: test["status"] for test in json.loads(proved.out)["results"]["tests"]}
    # Whether the libraries are here that load it, the environment says.
    assert statuses.pop("forward") in ("passed", "skipped")
    assert set(statuses.values()) == {"passed"}


def test_a_config_without_a_dtype_gets_one(loftq: Loftq, source: Path, tmp_path: Path) -> None:
    """A loader without one takes that of the first tensor, which may be float16 scales."""
    named = Path(shutil.copytree(source, tmp_path / "source"))
    config = json.loads((named / "config.json").read_text())
    del config["dtype"]
    (named / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    done = loftq("quantize", "-m", named, "-o", out, "--container", "gptq", "--bits", 8,
                 "--rank", 4, "--iterations", 1)  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    proved = loftq("verify", out)
    assert proved.code == 0, proved.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--container", "awq"), "awq"),
        (("--container", "gptq", "--double-quant"), "--container gptq has no"),
        (("--container", "gptq", "--quant-type", "fp4"), "--container gptq has no"),
        (("--container", "gptq", "--block-size", "256"), "no block size 256 in gptq"),
        (("--container", "gptq", "--init", "lora"), "does not quantize"),
        (("--container", "gptq", "--bits", "5"), "--bits '5' is not supported"),
        (("--bits", "8x1,4"), "not supported"),
    ],
)
def test_what_contradicts_a_container_is_a_mistake(
    loftq: Loftq, source: Path, options: tuple[str, ...], said: str
) -> None:
    done = loftq("quantize", "-m", source, "--dry-run", *options)
    assert done.code == 2
    assert said in done.err
