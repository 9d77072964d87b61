"""What `quantize` writes in the hands of those who read it: compressed-tensors and transformers.

To be run where the extra `compressed-tensors` is installed; elsewhere there is nothing to ask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from loftq_cli import api
from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.checkpoint.tensors import load_tensor
from tests.containers.demo_opt import WrittenOpt, windows

pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("default")  # theirs

NAME = "compressed-tensors"
WIDTHS = (2, 3, 4, 8)
BLOCK_SIZES = (32, 64, 128, -1)
Quantized = Callable[..., WrittenOpt]


def load(written: WrittenOpt, *, dequantize: bool) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        written.directory,
        quantization_config=CompressedTensorsConfig(dequantize=dequantize),
        output_loading_info=True,
    )
    assert not any(info.values()), info
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(windows(2, 48)).logits
    return found


def decompressed(written: WrittenOpt, module: str) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(written.directory).quantization_config
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    tensors = open_checkpoint(written.directory).tensors
    parts = {
        name.removeprefix(f"{module}."): load_tensor(*tensors[name])
        for name in tensors
        if name.startswith(f"{module}.weight_")
    }
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    found: torch.Tensor = compressor.decompress(parts, scheme)["weight"]
    return found


@pytest.mark.parametrize(
    ("bits", "block_size", "dtype"),
    [
        *((bits, block_size, "float32") for bits in WIDTHS for block_size in BLOCK_SIZES),
        *((bits, 64, "bfloat16") for bits in WIDTHS),
    ],
)
def test_unpacked_by_compressed_tensors_it_is_Q(
    bits: int, block_size: int, dtype: str, quantized_opt: Quantized
) -> None:
    written = quantized_opt(NAME, bits, block_size, dtype=dtype)
    for module, Q in written.Q().items():
        assert torch.equal(decompressed(written, module), Q), module


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantized_by_transformers_the_weights_are_Q(
    bits: int, block_size: int, quantized_opt: Quantized
) -> None:
    written = quantized_opt(NAME, bits, block_size)
    found, expected = load(written, dequantize=True).state_dict(), written.dequantized()
    assert found.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("bits", "dtype"), [*((bits, "float32") for bits in WIDTHS), (3, "float16"), (3, "bfloat16")]
)
def test_loaded_packed_it_gives_what_the_dequantized_model_gives(
    bits: int, dtype: str, quantized_opt: Quantized
) -> None:
    written = quantized_opt(NAME, bits, dtype=dtype)
    model, Q = load(written, dequantize=False), written.Q()
    container = written.container
    assert {name for name, each in model.named_modules() if container.holds(each)} == set(Q)
    for module, expected in Q.items():
        assert torch.equal(container.held(model.get_submodule(module)), expected), module
    assert torch.equal(logits(model), logits(written.dequantized()))


def test_each_width_is_read_where_its_group_says_so(quantized_opt: Quantized) -> None:
    written = quantized_opt(NAME, "8x1,3", 32)
    assert set(written.bits.values()) == {3, 8}
    found = logits(load(written, dequantize=False))
    assert torch.equal(found, logits(written.dequantized()))


def test_transformers_dequantizes_all_layers_by_the_first_group(quantized_opt: Quantized) -> None:
    """Without a word. Why `verify` does not load mixed widths; to be told that it can when this
    fails."""
    written = quantized_opt(NAME, "8x1,3", 32)
    model, bits = load(written, dequantize=True), written.bits
    for module, Q in written.Q().items():
        assert torch.equal(model.get_submodule(module).weight, Q) == (bits[module] == 3), module


def test_peft_wants_the_weights_dequantized(quantized_opt: Quantized) -> None:
    """Why that is what the README says, and `verify` does; packed there is no weight to adapt."""
    from peft import LoraConfig, get_peft_model

    model = load(quantized_opt(NAME, 3), dequantize=False)
    with pytest.raises(AttributeError, match="weight"):
        get_peft_model(model, LoraConfig(r=4, target_modules=["fc1"]))


@pytest.mark.parametrize("bits", WIDTHS)
def test_verify_loads_it(bits: int, quantized_opt: Quantized) -> None:
    results = api.verify(str(quantized_opt(NAME, bits).directory)).results
    assert {test.name: test.status for test in results.tests}["forward"] == "passed"
