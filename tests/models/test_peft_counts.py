"""Trainable parameters against PEFT's own, on a fresh model on the meta device for every count.

An adapter is counted on a model that never had another: wrapping one base model again and again
counts stale adapters too, which is how an earlier report came to 4,423,680 for GPT-2's c_attn.

PEFT puts adapters on some layers that loftq leaves as they are, because bitsandbytes or
transformers cannot hold them in 4 bits (awkward shapes, T5's `wo`, expert routers and experts,
subclasses of nn.Linear). Where a target reaches such layers the counts differ on purpose: then
PEFT gets the whole names of loftq's layers, and nothing that it had beyond them may be a layer that
the model class says can be held.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from tempfile import TemporaryDirectory

import peft
import pytest
import torch
import transformers

from loftq_cli.models.architecture import Architecture
from loftq_cli.models.costs import trainable_parameters
from loftq_cli.models.known import known_model
from loftq_cli.models.lookup import find_model
from loftq_cli.models.outline import Outline
from loftq_cli.models.presets import PRESETS, presets
from tests.battery import BATTERY

RANKS = (1, 24)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def on_meta(name: str) -> transformers.PreTrainedModel:
    entry = BATTERY[name]
    with torch.device("meta"):
        return getattr(transformers, entry.model_class)(entry.settings())


@cache
def saved(name: str) -> tuple[Outline, dict[str, str]]:
    """The outline of the saved model, and what the class calls the layers that files may rename."""
    with TemporaryDirectory() as directory:
        BATTERY[name].build().save_pretrained(directory)
        found = find_model(directory, print)
        assert found.checkpoint is not None
        tensors = [info for _, info in found.checkpoint.tensors.values()]
    inventory = Architecture(on_meta(name)).inventory(tensors)
    return found.outline, {layer.tensor: layer.module for layer in inventory.layers}


def peft_count(
    model: transformers.PreTrainedModel, targets: list[str] | str, rank: int
) -> tuple[int, set[str]]:
    """(parameters of A and B, modules that have them) on this model, which must be fresh."""
    classifies = "Classification" in type(model).__name__
    task_type = peft.TaskType.SEQ_CLS if classifies else None
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=rank, target_modules=targets, task_type=task_type)
    )
    # A classifier's head is trained too, as a whole; that is no adapter and not counted here.
    total = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    modules = {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }
    return total, modules


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("preset", [*PRESETS, "all-linear"])
@pytest.mark.parametrize("name", BATTERY)
def test_every_preset_of_every_architecture(name: str, preset: str, rank: int) -> None:
    outline, class_names = saved(name)
    chosen = next(each for each in presets(outline.layers) if each.name == preset)
    if not chosen.layers:
        assert not chosen.target_modules or preset == "all-linear"
        return
    modules = {class_names[layer.tensor] for layer in chosen.layers}
    renamed = modules != {layer.module for layer in chosen.layers}
    ours = trainable_parameters(chosen.layers, rank)
    targets = chosen.target_modules if preset != "all-linear" else "all-linear"
    if not renamed or preset == "all-linear":
        total, adapted = peft_count(on_meta(name), targets, rank)
        if adapted == modules:
            assert total == ours
            return
        assert modules < adapted
        assert not (adapted - modules) & set(class_names.values())
    total, adapted = peft_count(on_meta(name), sorted(modules), rank)
    assert adapted == modules
    assert total == ours


@pytest.mark.parametrize("name", ["gpt2", "Qwen2.5-0.5B", "Llama-3.2-1B", "gemma-3-270m"])
def test_full_size_models_of_the_table(name: str) -> None:
    found = known_model(name)
    assert found is not None
    for preset in presets(found[1].layers):
        total, _ = peft_count(full_size(name), preset_targets(preset.target_modules), 8)
        assert total == trainable_parameters(preset.layers, 8)


def preset_targets(names: list[str]) -> list[str] | str:
    return names if names != ["all-linear"] else "all-linear"


def full_size(name: str) -> transformers.PreTrainedModel:
    sizes = {
        "gpt2": transformers.GPT2Config(),
        "Qwen2.5-0.5B": transformers.Qwen2Config(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
            num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        ),
        "Llama-3.2-1B": transformers.LlamaConfig(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
        ),
        "gemma-3-270m": transformers.Gemma3TextConfig(
            vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
            num_attention_heads=4, num_key_value_heads=1, head_dim=256,
        ),
    }  # fmt: skip
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(sizes[name])


def test_gpt2_has_the_figures_of_the_design_note() -> None:
    found = known_model("gpt2")
    assert found is not None
    outline = found[1]
    by_name = {preset.name: preset.layers for preset in presets(outline.layers)}
    counts = [trainable_parameters(layers, 8) for layers in by_name.values()]
    assert dict(zip(by_name, counts, strict=True)) == {
        "attention": 294_912,
        "projection": 516_096,
        "mlp": 737_280,
        "attention+projection": 811_008,
        "all-linear": 1_179_648,
    }
