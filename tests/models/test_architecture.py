"""What the model class says about a checkpoint's tensors, where names alone would mislead."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from loftq_cli.checkpoint.safetensors import TensorInfo
from loftq_cli.models import architecture, layers
from loftq_cli.models.architecture import Architecture


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(64, 64)
        self.dense = nn.Linear(64, 64)


class Awkward(PreTrainedModel):
    """A head and a layer whose names end alike, and a layer of a shape nobody has kernels for."""

    config_class = BertConfig
    base_model_prefix = "none_of_these"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner = Inner()
        self.gate = nn.Linear(64, 1)
        self.classifier = nn.Linear(64, 2)
        self.post_init()


def tensors(model: PreTrainedModel) -> list[TensorInfo]:
    infos, position = [], 0
    for name, tensor in model.state_dict().items():
        infos.append(TensorInfo(name, "F32", tuple(tensor.shape), position, position + 4))
        position += 4
    return infos


def test_a_layer_that_the_skip_list_would_hit_by_accident_is_left() -> None:
    with torch.device("meta"):
        model = Awkward(BertConfig())
    subject = Architecture(model)
    inventory = subject.inventory(tensors(model))
    assert [layer.module for layer in inventory.layers] == ["inner.dense"]
    reasons = {left.tensor: left.reason for left in inventory.left}
    assert reasons["inner.classifier.weight"] == architecture.SKIPPED_BY_NAME
    assert reasons["classifier.weight"] == layers.OUTPUT_HEAD
    assert reasons["gate.weight"] == layers.AWKWARD_SHAPE
    skipped = subject.skip_modules(layer.module for layer in inventory.layers)
    assert {"classifier", "gate", "inner.classifier"} < {*skipped}
    assert subject.replaced_modules(skipped) == {"inner.dense"}
    # And what other classes make anew, but nothing that would hit the layer.
    assert {"lm_head", "score"} < {*skipped}


def test_names_of_a_checkpoint_without_the_base_prefix_find_their_modules() -> None:
    """GPT-2's files on the hub call `transformer.h.0.…` just `h.0.…`, and hold old buffers."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=96))
    infos = [
        TensorInfo("h.0.attn.bias", "F32", (1, 1, 8, 8), 0, 256),
        TensorInfo("h.0.attn.c_attn.weight", "F32", (64, 192), 256, 512),
        TensorInfo("wte.weight", "F32", (96, 64), 512, 1024),
    ]
    inventory = Architecture(model).inventory(infos)
    (layer,) = inventory.layers
    assert (layer.module, layer.tensor) == ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn.weight")
    assert (layer.out_features, layer.in_features, layer.transposed) == (192, 64, True)
    reasons = {left.tensor: left.reason for left in inventory.left}
    assert reasons == {
        "h.0.attn.bias": architecture.NOT_IN_MODEL,
        "wte.weight": layers.EMBEDDING,
    }
