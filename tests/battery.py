"""Small random models of many architectures: what `quantize` and the counts are held against.

Every entry builds a model with random weights from a config (no downloads), small enough that
quantizing, reloading and running it takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 96


@dataclass(frozen=True)
class Entry:
    """One architecture: its model class, config class and the settings that make it small."""

    model_class: str
    config_class: str
    config: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], dict[str, torch.Tensor]] = lambda: text_inputs()
    cannot: str | None = None  # why this architecture cannot be quantized, where it cannot

    def settings(self) -> transformers.PretrainedConfig:
        return getattr(transformers, self.config_class)(**self.config)

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model with random weights, in evaluation mode."""
        torch.manual_seed(seed)
        model = getattr(transformers, self.model_class)(self.settings())
        return model.to(dtype).eval()


def text_inputs() -> dict[str, torch.Tensor]:
    tokens = torch.arange(2 * 12).reshape(2, 12) % (VOCABULARY - 8) + 4
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def sequence_to_sequence_inputs() -> dict[str, torch.Tensor]:
    return {**text_inputs(), "decoder_input_ids": text_inputs()["input_ids"][:, :7]}


def image_inputs() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))}


TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_LIKE = {
    **TEXT,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BERT_LIKE = {
    **TEXT,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MIXTURE = {**LLAMA_LIKE, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

BATTERY: dict[str, Entry] = {
    "gpt2": Entry(
        "GPT2LMHeadModel",
        "GPT2Config",
        {**TEXT, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "llama": Entry("LlamaForCausalLM", "LlamaConfig", LLAMA_LIKE),
    "mistral": Entry("MistralForCausalLM", "MistralConfig", LLAMA_LIKE),
    "qwen2": Entry("Qwen2ForCausalLM", "Qwen2Config", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen3": Entry("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA_LIKE, "head_dim": 16}),
    "gemma2": Entry("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA_LIKE, "head_dim": 16}),
    "phi3": Entry("Phi3ForCausalLM", "Phi3Config", LLAMA_LIKE),
    "opt": Entry(
        "OPTForCausalLM",
        "OPTConfig",
        {
            **TEXT,
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 48,
        },
    ),
    "gpt_neox": Entry(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {
            **TEXT,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "falcon": Entry(
        "FalconForCausalLM",
        "FalconConfig",
        {**TEXT, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        cannot="a subclass of nn.Linear, which transformers does not replace",
    ),
    "bloom": Entry(
        "BloomForCausalLM", "BloomConfig", {**TEXT, "hidden_size": 64, "n_layer": 2, "n_head": 4}
    ),
    "t5": Entry(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        inputs=sequence_to_sequence_inputs,
    ),
    "bart": Entry(
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **TEXT,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        inputs=sequence_to_sequence_inputs,
    ),
    "bert": Entry("BertForSequenceClassification", "BertConfig", {**BERT_LIKE, "num_labels": 3}),
    "deberta_v2": Entry(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {
            **BERT_LIKE,
            "num_labels": 3,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 16,
        },
    ),
    "vit": Entry(
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "num_labels": 5,
        },
        inputs=image_inputs,
    ),
    "mixtral": Entry("MixtralForCausalLM", "MixtralConfig", {**LLAMA_LIKE, "num_local_experts": 4}),
    "qwen2_moe": Entry(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**MIXTURE, "num_experts": 4, "shared_expert_intermediate_size": 64},
    ),
}
