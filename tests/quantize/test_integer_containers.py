"""Directories in the containers of integers: written, foreseen to the byte, and proved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loftq_cli.checkpoint.adapter import ADAPTER_NAME
from loftq_cli.containers import kind_of
from tests.battery import BATTERY
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    BATTERY["llama"].build(dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def data_bytes(path: Path) -> int:
    """Of a safetensors file: its size on the disk without its header."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


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
    for name, file in (("output_bytes", "model.safetensors"), ("adapter_bytes", ADAPTER_NAME)):
        assert foreseen["totals"][name] == results["totals"][name] == data_bytes(out / file)
    assert foreseen["totals"]["stored_bits"] == results["totals"]["stored_bits"]
    proved = loftq("verify", out, "--json")
    assert proved.code == 0, proved.err
    statuses = {test["name"]: test["status"] for test in json.loads(proved.out)["results"]["tests"]}
    # transformers loads one width, where the libraries are that it asks.
    loads = bits == "3" and not kind_of(container, 3).missing_libraries()
    assert statuses.pop("forward") == ("passed" if loads else "skipped")
    assert set(statuses.values()) == {"passed"}


@pytest.mark.parametrize("container", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_a_weight_on_the_disk(
    loftq: Loftq, source: Path, container: str, bits: int, tmp_path: Path
) -> None:
    """2.25, 3.25 and 4.25 in compressed-tensors, by the sizes of files alone."""
    asked = ("quantize", "-m", source, "--container", container, "--bits", bits, "--rank", 4,
             "--iterations", 1, "--block-size", 64, "--json")  # fmt: skip
    foreseen = json.loads(loftq(*asked, "--dry-run").out)["results"]["totals"]["output_bytes"]
    done = loftq(*asked, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    written = data_bytes(tmp_path / "out" / "model.safetensors")
    assert written == foreseen
    shapes = [each["shape"] for each in json.loads(done.out)["results"]["layers"]]
    weights = sum(rows * columns for rows, columns in shapes)
    rest = data_bytes(source / "model.safetensors") - 2 * weights
    if container == "compressed-tensors":
        beside = sum(16 for _ in shapes)  # the shape
    else:  # the zero points of every block, and the block of every column
        beside = sum(rows * columns // 64 * bits // 8 + 4 * columns for rows, columns in shapes)
    assert 8 * (written - rest - beside) / weights == bits + 0.25


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
