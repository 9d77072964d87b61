"""Memory to fine-tune: worked by hand, held against the container, and against autograd itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from transformers import PreTrainedModel

from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.containers.base import Container
from loftq_cli.containers.bitsandbytes4 import Bitsandbytes4
from loftq_cli.containers.bitsandbytes8 import Bitsandbytes8
from loftq_cli.containers.gptq import Gptq
from loftq_cli.containers.unquantized import Unquantized
from loftq_cli.engines.plan import PlannedLayer
from loftq_cli.models.costs import memory, trainable_parameters
from loftq_cli.models.known import known_model
from loftq_cli.models.layers import Inventory, LeftTensor, LinearLayer
from loftq_cli.models.lookup import find_model
from loftq_cli.models.outline import Outline, make_outline
from tests.battery import BATTERY

NF4 = Bitsandbytes4("nf4", 64)


def planned_tensors(outline: Outline, container: Container, bits: int) -> list[PlannedTensor]:
    return [
        tensor
        for each in outline.layers
        for tensor in container.planned(PlannedLayer(each, bits, rank=0).weight)
    ]


def layer(module: str, out_features: int, in_features: int) -> LinearLayer:
    return LinearLayer(module, f"{module}.weight", out_features, in_features, False, "BF16")


def two_blocks() -> Outline:
    """Two blocks of one 256 × 128 and one 128 × 256 layer, a vocabulary of 1000, 10 biases."""
    matrices = [
        each
        for block in range(2)
        for each in (layer(f"h.{block}.up", 256, 128), layer(f"h.{block}.down", 128, 256))
    ]
    embedding = LeftTensor("wte.weight", (1000, 128), "BF16", 256_000, "embedding")
    total = 4 * 256 * 128 + 128_000 + 10
    return make_outline("TinyForCausalLM", [*matrices, embedding], (1, 10), total, None)


def test_every_term_by_hand() -> None:
    outline = two_blocks()
    adapted = [each for each in outline.layers if each.module.endswith("up")]
    needed = memory(outline, adapted, 8, held=NF4, bits=4, tokens=15)
    tokens = 15
    trainable = 2 * 8 * (256 + 128)
    assert needed.weights_bytes == 4 * 256 * 128 // 2
    assert needed.absmax_bytes == 4 * (256 * 128 // 64) * 4
    assert needed.unquantized_bytes == 2 * (128_000 + 10)
    assert needed.adapter_bytes == 4 * trainable
    assert needed.gradients_bytes == 4 * trainable
    assert needed.optimizer_bytes == 8 * trainable
    block = 2 * 2 * (256 + 128) + 4 * 128 + 4 * 8
    assert needed.activations_bytes == tokens * 2 * block
    # The layers read 128 and 256 numbers as often; the first in the file is the residual stream.
    assert needed.activations_with_checkpointing_bytes == tokens * (2 * 2 * 128 + block)
    assert needed.logits_bytes == tokens * 1000 * 10
    assert needed.workspace_bytes == 2 * 256 * 128
    totals = ("total_bytes", "total_with_checkpointing_bytes")
    given = needed.model_dump(exclude={*totals, "activations_with_checkpointing_bytes"})
    assert needed.total_bytes == sum(given.values())
    saved = needed.activations_bytes - needed.activations_with_checkpointing_bytes
    assert needed.total_with_checkpointing_bytes == needed.total_bytes - saved


def test_16_bits_need_neither_absmax_nor_a_workspace() -> None:
    outline = two_blocks()
    needed = memory(outline, outline.layers, 8, held=Unquantized("none"), bits=16, tokens=1)
    assert (needed.absmax_bytes, needed.workspace_bytes) == (0, 0)
    assert needed.weights_bytes + needed.unquantized_bytes == 2 * outline.parameters


@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_weights_at_4_bits_are_those_of_the_container(block_size: int) -> None:
    found = known_model("gpt2")
    assert found is not None
    outline, container = found[1], Bitsandbytes4("nf4", block_size)
    needed = memory(outline, [], 8, held=container, bits=4, tokens=1)
    planned = planned_tensors(outline, container, 4)
    held = [each.nbytes for each in planned if each.name.endswith(("weight", "absmax"))]
    assert needed.weights_bytes + needed.absmax_bytes == sum(held)


def test_weights_at_8_bits_are_those_of_the_container() -> None:
    outline, container = two_blocks(), Bitsandbytes8("int8")
    needed = memory(outline, [], 8, held=container, bits=8, tokens=1)
    planned = planned_tensors(outline, container, 8)
    held = [each.nbytes for each in planned if not each.name.endswith("weight_format")]
    assert needed.weights_bytes + needed.absmax_bytes == sum(held)


@pytest.mark.parametrize(("bits", "block_size"), [(2, 64), (3, -1), (8, 32)])
def test_integer_weights_are_those_of_the_container(bits: int, block_size: int) -> None:
    outline, container = two_blocks(), Gptq("int", block_size)
    needed = memory(outline, [], 8, held=container, bits=bits, tokens=1)
    planned = planned_tensors(outline, container, bits)
    assert needed.weights_bytes + needed.absmax_bytes == sum(each.nbytes for each in planned)


def test_a_model_without_linear_layers() -> None:
    outline = Outline("Nothing", Inventory(()), (1, 10), 10, 0, None)
    needed = memory(outline, [], 8, held=NF4, bits=4, tokens=16)
    assert needed.total_bytes == needed.context_bytes + 20
    assert trainable_parameters([], 8) == 0


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "qwen3", "gemma2", "phi3", "opt", "gpt_neox", "bloom"]
)
def test_activations_are_near_what_autograd_keeps(name: str, tmp_path: Path) -> None:
    """Within 0.5 to 1.5 times, on models so small that what no layer explains shows most."""
    model = BATTERY[name].build(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    outline = find_model(str(tmp_path), print).outline
    vocabulary = outline.vocabulary
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=8, target_modules=[each.module for each in outline.layers], lora_dropout=0.0
        ),
    )
    kept = saved_for_backward(adapted.train(), vocabulary)
    needed = memory(outline, outline.layers, 8, held=NF4, bits=4, tokens=96)
    assert 0.5 < kept / needed.activations_bytes < 1.5


def saved_for_backward(model: PreTrainedModel, vocabulary: int) -> int:
    """Bytes that one forward pass keeps, apart from parameters, buffers and logits."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        logits = tensor.dim() > 0 and tensor.shape[-1] == vocabulary
        if storage.data_ptr() not in own and not logits:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.arange(2 * 48).reshape(2, 48) % (vocabulary - 8) + 4
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=tokens, labels=tokens)
    return sum(storage.nbytes() for storage in kept.values())
