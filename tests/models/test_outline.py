"""Outlines from headers: parameters counted once, buffers not at all, over the battery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loftq_cli.checkpoint.safetensors import TensorInfo
from loftq_cli.models import layers
from loftq_cli.models.known import known_model
from loftq_cli.models.lookup import find_model
from loftq_cli.models.outline import TIED_TO_HEAD, Outline, outline_of
from tests.battery import BATTERY

GPT2_CONFIG = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 1024}


def silent(text: str) -> None:
    raise AssertionError(f"nobody should say {text!r}")


def infos(shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> list[TensorInfo]:
    return [TensorInfo(name, dtype, shape, 0, 0) for name, shape in shapes.items()]


def gpt2_file() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the hub's gpt2/model.safetensors."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)}
    for block in range(12):
        shapes |= {
            f"h.{block}.ln_1.weight": (768,),
            f"h.{block}.ln_1.bias": (768,),
            f"h.{block}.attn.bias": (1, 1, 1024, 1024),  # the causal mask
            f"h.{block}.attn.c_attn.weight": (768, 2304),
            f"h.{block}.attn.c_attn.bias": (2304,),
            f"h.{block}.attn.c_proj.weight": (768, 768),
            f"h.{block}.attn.c_proj.bias": (768,),
            f"h.{block}.ln_2.weight": (768,),
            f"h.{block}.ln_2.bias": (768,),
            f"h.{block}.mlp.c_fc.weight": (768, 3072),
            f"h.{block}.mlp.c_fc.bias": (3072,),
            f"h.{block}.mlp.c_proj.weight": (3072, 768),
            f"h.{block}.mlp.c_proj.bias": (768,),
        }
    return {**shapes, "ln_f.weight": (768,), "ln_f.bias": (768,)}


def summary(outline: Outline) -> dict[str, Any]:
    """What does not depend on how the file spells its names."""
    return {
        "parameters": outline.parameters,
        "vectors": outline.vectors,
        "vocabulary": outline.vocabulary,
        "context": outline.context,
        "layers": sorted(
            (layer.module.removeprefix("transformer."), layer.out_features, layer.in_features)
            for layer in outline.layers
        ),
        "left": sorted(
            (left.tensor.removeprefix("transformer."), left.shape, left.reason)
            for left in outline.inventory.left
        ),
    }


def test_the_hubs_gpt2_file_is_the_gpt2_of_the_table() -> None:
    known = known_model("gpt2")
    assert known is not None
    outline = outline_of(infos(gpt2_file()), GPT2_CONFIG)
    assert outline.parameters == 124_439_808
    assert summary(outline) == summary(known[1])


def test_a_tied_head_that_is_stored_again_counts_once() -> None:
    tied = outline_of(infos(gpt2_file() | {"lm_head.weight": (50257, 768)}), GPT2_CONFIG)
    assert tied.parameters == 124_439_808
    assert [left.reason for left in tied.inventory.left] == [TIED_TO_HEAD, layers.EMBEDDING]
    untied = outline_of(
        infos(gpt2_file() | {"lm_head.weight": (50257, 768)}),
        {**GPT2_CONFIG, "tie_word_embeddings": False},
    )
    assert untied.parameters == 124_439_808 + 50257 * 768
    assert untied.vocabulary == 50257


def test_embeddings_of_encoder_and_decoder_that_repeat_the_shared_one() -> None:
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    shapes = {
        "shared.weight": (96, 64),
        "encoder.embed_tokens.weight": (96, 64),
        "decoder.embed_tokens.weight": (96, 64),
    }
    assert outline_of(infos(shapes), config).parameters == 96 * 64


def test_a_classifier_as_small_as_the_token_types_is_no_copy_of_them() -> None:
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    shapes = {
        "bert.embeddings.word_embeddings.weight": (96, 64),
        "bert.embeddings.token_type_embeddings.weight": (2, 64),
        "classifier.weight": (2, 64),
    }
    outline = outline_of(infos(shapes), config)
    assert outline.parameters == 98 * 64 + 2 * 64
    assert outline.vocabulary == 0, "it scores no tokens"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("rotary_emb.inv_freq", "F32"),
        ("embeddings.position_ids", "I64"),
        ("attn.masked_bias", "F32"),
        ("norm.num_batches_tracked", "I64"),
        ("final_logits_bias", "F32"),
    ],
)
def test_buffers_are_no_parameters(name: str, dtype: str) -> None:
    assert outline_of(infos({name: (4,)}, dtype), {}).parameters == 0


def test_the_text_part_of_a_multimodal_config_decides() -> None:
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"max_position_embeddings": 512, "tie_word_embeddings": False},
    }
    shapes = {"model.embed_tokens.weight": (96, 64), "lm_head.weight": (96, 64)}
    outline = outline_of(infos(shapes), config)
    assert (outline.context, outline.parameters) == (512, 2 * 96 * 64)


@pytest.mark.parametrize("name", BATTERY)
def test_a_saved_model_has_the_parameters_of_its_class(name: str, tmp_path: Path) -> None:
    model = BATTERY[name].build()
    model.save_pretrained(tmp_path)
    found = find_model(str(tmp_path), silent)
    assert found.outline.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.outline.architecture == BATTERY[name].model_class
    assert found.identity.source == "directory"
    config = json.loads((tmp_path / "config.json").read_text())
    if "ForCausalLM" in found.outline.architecture or "LMHead" in found.outline.architecture:
        assert found.outline.vocabulary == config["vocab_size"]
