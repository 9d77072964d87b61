"""Every kind of damage to what the containers of integers write is found, and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.verify.conftest import (
    LAYER,
    Loftq,
    edit_json,
    edit_report,
    overwrite,
    reseal,
    run_verify,
    statuses,
)

WEIGHTS = "model.safetensors"
# The tensors of a layer, and the check that finds other bytes in one.
PARTS = {
    "gptq": {
        "qweight": "residuals", "scales": "residuals", "qzeros": "container", "g_idx": "container",
    },
    "compressed-tensors": {
        "weight_packed": "residuals", "weight_scale": "residuals", "weight_shape": "container",
    },
}  # fmt: skip
EVERY_PART = [(container, part) for container, parts in PARTS.items() for part in parts]


@pytest.fixture(scope="module")
def made(originals: Path, loftq: Loftq) -> Callable[[str, str], Path]:
    """The directory of a container and its bits, written when it is first asked for."""

    def directory(container: str, bits: str) -> Path:
        out = originals / f"{container} {bits}"
        if not out.exists():
            done = loftq("quantize", "-m", originals / "source", "-o", out, "--rank", 4,
                         "--iterations", 1, "--container", container, "--bits", bits,
                         "--block-size", 32)  # fmt: skip
            assert done.code == 0, done.err
        return out

    return directory


@pytest.fixture
def copied(made: Callable[[str, str], Path], tmp_path: Path) -> Callable[..., Path]:
    def copy(container: str, bits: str = "3") -> Path:
        return Path(shutil.copytree(made(container, bits), tmp_path / "out"))

    return copy


def change_tensors(out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(out / WEIGHTS)
    change(tensors)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})


def require_found(loftq: Loftq, out: Path, check: str, named: str) -> None:
    """By the first check that fails, though the report knows sizes and hashes of the damage."""
    reseal(out)
    outcome, results = run_verify(loftq, out)
    assert outcome.code == 3, outcome.err
    assert "unexpected" not in outcome.err
    failed = next(test for test in results["tests"] if test["status"] == "failed")
    assert failed["name"] == check, outcome.err
    assert named in failed["detail"] + failed["cause"]


@pytest.mark.parametrize(("container", "part"), EVERY_PART)
def test_another_bit(container: str, part: str, copied: Callable[..., Path], loftq: Loftq) -> None:
    def flip(piece: bytearray) -> None:
        piece[1] ^= 0x04

    out = copied(container)
    overwrite(out / WEIGHTS, f"{LAYER}.{part}", flip)
    require_found(loftq, out, PARTS[container][part], LAYER)


@pytest.mark.parametrize(("container", "part"), EVERY_PART)
@pytest.mark.parametrize("changed", ["dtype", "shape", "missing"])
def test_a_part_that_is_none(
    changed: str, container: str, part: str, copied: Callable[..., Path], loftq: Loftq
) -> None:
    name = f"{LAYER}.{part}"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors.pop(name)
        if changed == "dtype":
            tensors[name] = tensor.double()
        elif changed == "shape":
            tensors[name] = torch.cat((tensor, tensor))

    out = copied(container)
    change_tensors(out, change)
    require_found(loftq, out, "container", LAYER)


@pytest.mark.parametrize(
    ("container", "part", "value"),
    [
        ("gptq", "scales", 1 + 2**-10),  # between two of bfloat16
        ("compressed-tensors", "weight_scale", 2.0**-30),  # below those of float16
        ("compressed-tensors", "weight_scale", 1e5),  # above them
        *(("gptq", "scales", value) for value in (float("nan"), float("inf"))),
        *(("compressed-tensors", "weight_scale", value) for value in (float("nan"), float("-inf"))),
    ],
)
def test_a_scale_that_not_every_container_holds(
    container: str, part: str, value: float, copied: Callable[..., Path], loftq: Loftq
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.{part}"][1, 1] = value
        assert tensors[f"{LAYER}.{part}"][1, 1].item() != 0

    out = copied(container)
    change_tensors(out, change)
    require_found(loftq, out, "container", LAYER)


def swapped_zeros(tensors: dict[str, torch.Tensor]) -> None:
    """As GPTQ's second version has them, without the one that is taken off."""
    tensors[f"{LAYER}.qzeros"].fill_(0x24924924)


def act_order(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.g_idx"] = tensors[f"{LAYER}.g_idx"].flip(0)


def swapped_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight_shape"
    tensors[name] = tensors[name].flip(0)


@pytest.mark.parametrize(
    ("container", "change", "named"),
    [
        ("gptq", swapped_zeros, f"{LAYER}.qzeros"),
        ("gptq", act_order, f"{LAYER}.g_idx"),
        ("compressed-tensors", swapped_shape, "up_proj.weight_shape"),
    ],
)
def test_another_meaning_of_the_codes(
    container: str,
    change: Callable[[dict[str, torch.Tensor]], None],
    named: str,
    copied: Callable[..., Path],
    loftq: Loftq,
) -> None:
    out = copied(container)
    change_tensors(out, change)
    require_found(loftq, out, "container", named)


@pytest.mark.parametrize("container", PARTS)
def test_a_layer_too_many(container: str, copied: Callable[..., Path], loftq: Loftq) -> None:
    """The head is there twice: as it was, and quantized."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for part in PARTS[container]:
            tensors[f"lm_head.{part}"] = tensors[f"{LAYER}.{part}"].clone()

    out = copied(container)
    change_tensors(out, change)
    require_found(loftq, out, "container", "lm_head")


def put(*path: str | int, value: Any) -> Callable[[Any], None]:
    """Sets what lies at ``path`` of quantization_config."""

    def change(config: Any) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


def drop(*path: str | int, value: str) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        for key in path:
            config = config[key]
        config.remove(value)

    return change


def swap_widths(config: Any) -> None:
    if "config_groups" in config:
        one, other = (group["weights"] for group in config["config_groups"].values())
        one["num_bits"], other["num_bits"] = other["num_bits"], one["num_bits"]
    else:
        changed = [each for each in config["dynamic"].values() if each]
        swapped = config["bits"]
        config["bits"] = changed[0]["bits"]
        for each in changed:
            each["bits"] = swapped


def forget_dynamic(config: Any) -> None:
    config["dynamic"] = {}


SCHEME = ("config_groups", "group_0", "weights")


@pytest.mark.parametrize(
    ("container", "bits", "change"),
    [
        *((container, "8x1,2", swap_widths) for container in PARTS),
        ("gptq", "8x1,2", forget_dynamic),
        ("gptq", "3", put("bits", value=4)),
        ("gptq", "3", put("group_size", value=64)),
        ("gptq", "3", put("desc_act", value=True)),
        ("gptq", "3", put("sym", value=False)),
        ("gptq", "3", put("checkpoint_format", value="gptq_v2")),
        ("gptq", "3", put("quant_method", value="awq")),
        ("gptq", "3", drop("modules_in_block_to_quantize", 0, value=LAYER)),
        ("gptq", "3", drop("modules_to_not_convert", value="lm_head")),
        ("compressed-tensors", "3", put(*SCHEME, "num_bits", value=4)),
        ("compressed-tensors", "3", put(*SCHEME, "group_size", value=64)),
        ("compressed-tensors", "3", put(*SCHEME, "strategy", value="channel")),
        ("compressed-tensors", "3", put(*SCHEME, "symmetric", value=False)),
        ("compressed-tensors", "3", put(*SCHEME, "actorder", value="weight")),
        ("compressed-tensors", "3", put("config_groups", "group_0", "targets", value=[LAYER])),
        ("compressed-tensors", "3", put("format", value="naive-quantized")),
        ("compressed-tensors", "3", put("quantization_status", value="frozen")),
        ("compressed-tensors", "3", drop("ignore", value="lm_head")),
        ("compressed-tensors", "8x1,2", drop("config_groups", "group_1", "targets", value=LAYER)),
    ],
)
def test_a_config_that_says_otherwise(
    container: str,
    bits: str,
    change: Callable[[Any], None],
    copied: Callable[..., Path],
    loftq: Loftq,
) -> None:
    out = copied(container, bits)
    edit_json(out / "config.json", lambda config: change(config["quantization_config"]))
    require_found(loftq, out, "container", "config.json")


@pytest.mark.parametrize("container", PARTS)
def test_a_report_with_another_width(
    container: str, copied: Callable[..., Path], loftq: Loftq
) -> None:
    def change(results: Any) -> None:
        next(each for each in results["layers"] if each["name"] == LAYER)["bits"] = 2

    out = copied(container)
    edit_report(out, change)
    outcome, results = run_verify(loftq, out)
    assert outcome.code == 3
    assert statuses(results)["container"] == "failed"
