"""`pack-quantized` files in the hands of those who read them: compressed-tensors and transformers.

To be run where the extra `compressed-tensors` is installed; elsewhere there is nothing to ask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.checkpoint.tensors import load_tensor
from loftq_cli.containers.compressed_tensors import CompressedTensors
from tests.containers.integer_models import PROJECTIONS, tokens, write_model

pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("default")  # theirs

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BLOCK_SIZES = (32, 64, 128, -1)
MIXED = {**dict.fromkeys(PROJECTIONS, 4), "o_proj": 3, "down_proj": 8, "gate_proj": 2, "up_proj": 2}


def load(directory: Path, *, dequantize: bool) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        quantization_config=CompressedTensorsConfig(dequantize=dequantize),
        output_loading_info=True,
    )
    assert not any(info.values()), info
    return model.eval()


def decompressed(directory: Path, module: str, scheme: Any) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor

    tensors = open_checkpoint(directory).tensors
    parts = {
        name.removeprefix(f"{module}."): load_tensor(*tensors[name])
        for name in tensors
        if name.startswith(f"{module}.")
    }
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    return compressor.decompress(parts, scheme)["weight"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacked_by_compressed_tensors_it_is_Q(
    bits: int, block_size: int, dtype: str, tmp_path: Path
) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    written = write_model(tmp_path, CompressedTensors("int", block_size), bits, DTYPES[dtype])
    config = written.config["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    for module, Q in written.Q.items():
        assert torch.equal(decompressed(tmp_path, module, scheme), Q), module


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_loaded_by_transformers_the_weights_are_Q(
    bits: int, block_size: int, tmp_path: Path
) -> None:
    written = write_model(tmp_path, CompressedTensors("int", block_size), bits, torch.bfloat16)
    model = load(tmp_path, dequantize=True)
    for module, Q in written.Q.items():
        assert torch.equal(model.get_submodule(module).weight, Q), module
    assert torch.equal(model.lm_head.weight, written.original.lm_head.weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loaded_packed_it_gives_what_the_dequantized_model_gives(
    bits: int, dtype: str, tmp_path: Path
) -> None:
    container = CompressedTensors("int", 64)
    written = write_model(tmp_path, container, bits, DTYPES[dtype])
    model = load(tmp_path, dequantize=False)
    assert {name for name, each in model.named_modules() if container.holds(each)} == set(written.Q)
    for module, Q in written.Q.items():
        assert torch.equal(container.held(model.get_submodule(module)), Q), module
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, written.dequantized()(tokens()).logits)


def test_each_width_is_read_where_its_group_says_so(tmp_path: Path) -> None:
    written = write_model(tmp_path, CompressedTensors("int", 32), MIXED, torch.bfloat16)
    model = load(tmp_path, dequantize=False)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, written.dequantized()(tokens()).logits)


def test_transformers_dequantizes_all_layers_by_the_first_group(tmp_path: Path) -> None:
    """Why `verify` does not load mixed widths; to be told that it can when this fails."""
    write_model(tmp_path, CompressedTensors("int", 32), MIXED, torch.bfloat16)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        load(tmp_path, dequantize=True)


def test_peft_wants_the_weights_dequantized(tmp_path: Path) -> None:
    """Why that is what the README says, and `verify` does; packed there is no weight to adapt."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=list(PROJECTIONS))
    write_model(tmp_path, CompressedTensors("int", 64), 3, torch.bfloat16)
    with pytest.raises(AttributeError, match="weight"):
        get_peft_model(load(tmp_path, dequantize=False), config)
    model = get_peft_model(load(tmp_path, dequantize=True), config)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    found = {name: each.grad for name, each in model.named_parameters() if "lora_B" in name}
    assert len(found) == 14
    assert all(each is not None and each.isfinite().all() for each in found.values())
