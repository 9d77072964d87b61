"""The containers of integers: the same codes and scales in each, and nothing rounded between."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.checkpoint.tensors import tensor_memory
from loftq_cli.checkpoint.writer import write_safetensors
from loftq_cli.containers import packing
from loftq_cli.containers.base import Damaged, StoredWeight, Weight
from loftq_cli.containers.compressed_tensors import CompressedTensors
from loftq_cli.containers.gptq import Gptq
from loftq_cli.core.integers import QuantizedIntegers, dequantize_integers
from loftq_cli.errors import InvalidSetting, UsageError
from tests.containers.integer_models import SHORT, quantized

KINDS = (Gptq, CompressedTensors)
WIDTHS = (2, 3, 4, 8)
BLOCK_SIZES = (32, 64, 128, -1)
SHAPE = (96, 256)
# Weights do not reach beyond a float16, and this is about files.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def weight_of(bits: int, dtype: torch.dtype = torch.bfloat16, **changed: Any) -> Weight:
    weight = Weight("model.up.weight", "model.up", SHAPE, bits, SHORT[dtype])
    return replace(weight, **changed)


def codes_of(bits: int, block_size: int, dtype: torch.dtype = torch.bfloat16) -> QuantizedIntegers:
    W = torch.randn(SHAPE, generator=torch.Generator().manual_seed(bits)).to(dtype)
    return quantized(W, bits, block_size)


def stored(container: Any, weight: Weight, codes: QuantizedIntegers, path: Path) -> StoredWeight:
    write_safetensors(
        path / "model.safetensors",
        container.planned(weight),
        container.tensors(weight.name, codes),
    )
    found: StoredWeight = container.read(open_checkpoint(path).tensors, weight, "cpu")
    return found


def files_of(container: Any, weight: Weight, codes: QuantizedIntegers) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, piece in container.tensors(weight.name, codes):
        found[name] = found.get(name, b"") + bytes(piece)
    return found


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_come_back_as_they_were(
    bits: int, block_size: int, kind: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    container, codes = kind("int", block_size), codes_of(bits, block_size, dtype)
    assert (codes.scales < 0).any()
    found = stored(container, weight_of(bits, dtype), codes, tmp_path)
    container.require_codes(found)
    again = container.quantized(found)
    assert torch.equal(again.codes, codes.codes)
    assert torch.equal(again.scales, codes.scales)
    assert (again.format, again.dtype) == (codes.format, dtype)
    assert torch.equal(container.runtime(found), dequantize_integers(codes))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_from_one_container_to_the_other_and_back_gives_the_same_bytes(
    bits: int, block_size: int, tmp_path: Path
) -> None:
    weight, codes = weight_of(bits), codes_of(bits, block_size)
    first = files_of(CompressedTensors("int", block_size), weight, codes)
    for kind in (CompressedTensors, Gptq):
        container = kind("int", block_size)
        directory = tmp_path / container.name
        directory.mkdir()
        codes = container.quantized(stored(container, weight, codes, directory))
    assert files_of(CompressedTensors("int", block_size), weight, codes) == first


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_up_the_whole(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    container, codes = kind("int", 64), codes_of(3, 64)
    whole = files_of(container, weight_of(3), codes)
    monkeypatch.setattr(packing, "_CHUNK", 1000)
    assert len(list(container.tensors("model.up.weight", codes))) > len(whole)
    assert files_of(container, weight_of(3), codes) == whole


@pytest.mark.parametrize(("bits", "told"), [(2, 2.25), (3, 3.25), (4, 4.25), (8, 8.25)])
def test_bits_a_weight_in_the_file(bits: int, told: float) -> None:
    weight = weight_of(bits, shape=(4096, 4096))
    sizes = {kind: 8 * sum(each.nbytes for each in kind("int", 64).planned(weight)) / 4096**2
             for kind in KINDS}  # fmt: skip
    assert sizes[CompressedTensors] == pytest.approx(told, abs=1e-4)
    # The zero points of every block, and the block of every column.
    assert sizes[Gptq] == pytest.approx(told + bits / 64 + 32 / 4096, abs=1e-4)


def test_gptq_lies_transposed() -> None:
    codes, weight = codes_of(3, 64), weight_of(3)
    ours = files_of(Gptq("int", 64), weight, codes)
    packed = packing.pack(codes.codes, 3)
    assert ours["model.up.qweight"] == bytes(tensor_memory(packed.t()))
    theirs = files_of(CompressedTensors("int", 64), weight, codes)
    assert theirs["model.up.weight_packed"] == bytes(tensor_memory(packed))
    zeros = torch.frombuffer(bytearray(ours["model.up.qzeros"]), dtype=torch.int32).view(4, -1)
    assert packing.numbers_of_words(zeros, 3).eq(3).all()  # the zero point is 4


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_told_before(kind: Any) -> None:
    container = kind("int", 128)
    container.require_fit([weight_of(4)])
    with pytest.raises(InvalidSetting, match=r"block size 128 does not fit model\.up") as raised:
        container.require_fit([weight_of(4, shape=(96, 256)), weight_of(4, shape=(64, 192))])
    assert raised.value.hint == "--block-size 64"
    with pytest.raises(InvalidSetting, match="does not fit into"):
        kind("int", -1).require_fit([weight_of(4, shape=(64, 100))])


def test_what_only_one_of_them_takes() -> None:
    with pytest.raises(InvalidSetting, match="does not fit into gptq"):
        Gptq("int", 64).require_fit([weight_of(4, shape=(40, 64))])
    CompressedTensors("int", 64).require_fit([weight_of(4, shape=(40, 64))])
    with pytest.raises(InvalidSetting, match="does not fit into compressed-tensors"):
        CompressedTensors("int", 64).require_fit([weight_of(4, transposed=True)])
    Gptq("int", 64).require_fit([weight_of(4, transposed=True)])


@pytest.mark.parametrize("kind", KINDS)
def test_block_sizes(kind: Any) -> None:
    def form(block_size: int) -> Any:
        return SimpleNamespace(quant_type="nf4", block_size=block_size, double_quant=False)

    for block_size in BLOCK_SIZES:
        assert kind.of(form(block_size)).block_size == block_size
    with pytest.raises(UsageError, match="no block size 256"):
        kind.of(form(256))


def mixed() -> list[Weight]:
    widths = {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 3, "up_proj": 2, "gate_proj": 2}
    return [
        weight_of(bits, name=f"model.layers.{block}.{name}.weight",
                  module=f"model.layers.{block}.{name}")
        for block in (1, 11) for name, bits in widths.items()
    ]  # fmt: skip


def test_groups_of_compressed_tensors() -> None:
    config = CompressedTensors("int", 64).quantization_config([weight_of(3)], ["lm_head"], "BF16")
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"]["num_bits"] == 3
    assert group["weights"]["group_size"] == 64
    assert config["ignore"] == ["lm_head"]
    whole_rows = CompressedTensors("int", -1).quantization_config([weight_of(3)], [], None)
    (group,) = whole_rows["config_groups"].values()
    assert group["weights"]["strategy"] == "channel"
    assert "group_size" not in group["weights"]
    groups = CompressedTensors("int", 64).quantization_config(mixed(), [], None)["config_groups"]
    bits = {
        module: group["weights"]["num_bits"]
        for group in groups.values()
        for module in group["targets"]
    }
    assert bits == {weight.module: weight.bits for weight in mixed()}
    assert groups["group_0"]["weights"]["num_bits"] == 4  # what most have


def test_dynamic_of_gptq() -> None:
    config = Gptq("int", 64).quantization_config(mixed(), ["lm_head", "model.layers.1.x"], None)
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 64, True)
    assert config["block_name_to_quantize"] == "model.layers"

    def bits_of(module: str) -> int | bool:
        """As gptqmodel and vLLM ask it."""
        for pattern, changed in config["dynamic"].items():
            if re.match(pattern[2:], module):
                return False if pattern.startswith("-:") else changed["bits"]
        return config["bits"]

    assert {weight.module: bits_of(weight.module) for weight in mixed()} == {
        weight.module: weight.bits for weight in mixed()
    }
    assert bits_of("lm_head") is False
    assert bits_of("model.layers.1.x") is False
    # vLLM asks by the name of what it fuses.
    assert bits_of("model.layers.11.gate_up_proj") == 2
    assert bits_of("model.layers.11.qkv_proj") == 4
    assert Gptq("int", -1).quantization_config(mixed(), [], None)["group_size"] == -1


@pytest.mark.parametrize("part", ["qzeros", "g_idx"])
def test_another_grid_or_order_in_gptq_is_damage(part: str, tmp_path: Path) -> None:
    container = Gptq("int", 64)
    found = stored(container, weight_of(4), codes_of(4, 64), tmp_path)
    found.parts[f"model.up.{part}"].view(-1)[0] += 1
    with pytest.raises(Damaged, match=part):
        container.require_codes(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**-30, 1.0 + 2.0**-10])
def test_a_scale_that_the_other_could_not_hold_is_damage(
    kind: Any, value: float, tmp_path: Path
) -> None:
    container = kind("int", 64)
    found = stored(container, weight_of(4, torch.float32), codes_of(4, 64, torch.float32), tmp_path)
    (name,) = (name for name in found.parts if name.endswith(("scales", "weight_scale")))
    found.parts[name][0, 0] = value
    if found.parts[name][0, 0] == 0:
        return  # the container itself cannot hold it
    with pytest.raises(Damaged, match="scales"):
        container.require_codes(found)


def test_a_shape_that_says_otherwise_is_damage(tmp_path: Path) -> None:
    container, weight = CompressedTensors("int", 64), weight_of(4)
    chunks = files_of(container, weight, codes_of(4, 64))
    chunks["model.up.weight_shape"] = bytes(tensor_memory(torch.tensor([256, 96])))
    write_safetensors(tmp_path / "model.safetensors", container.planned(weight), chunks.items())
    with pytest.raises(Damaged, match="weight_shape"):
        container.read(open_checkpoint(tmp_path).tensors, weight, "cpu")
