"""Small random models of every architecture that the README's table names.

The battery (`tests.battery`) is what single properties are tested on; here is breadth. How an entry
is quantized, loaded and judged is in `tests.loads`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.battery import (
    BATTERY,
    BERT_LIKE,
    LLAMA_LIKE,
    MIXTURE,
    TEXT,
    VOCABULARY,
    Entry,
    image_inputs,
    sequence_to_sequence_inputs,
    text_inputs,
)

Inputs = Callable[[], dict[str, torch.Tensor]]
IMAGE_TOKEN = VOCABULARY - 2


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def ended_text_inputs() -> dict[str, torch.Tensor]:
    """Some classifiers look where a text ends."""
    inputs = text_inputs()
    inputs["input_ids"][:, -1] = TEXT["eos_token_id"]
    return inputs


def image_and_text_inputs() -> dict[str, torch.Tensor]:
    """LLaVA's: the image takes the place of 16 tokens."""
    tokens = text_inputs()["input_ids"].repeat(1, 2)
    tokens[:, 2:18] = IMAGE_TOKEN
    ones = torch.ones_like(tokens)
    return {"input_ids": tokens, "attention_mask": ones, "pixel_values": noise(2, 3, 32, 32)}


def patches_and_text_inputs() -> dict[str, torch.Tensor]:
    """Qwen2-VL's: an image of 4 × 4 patches, of which 2 × 2 are a token."""
    tokens = text_inputs()["input_ids"][:1].clone()
    tokens[:, 2:6] = IMAGE_TOKEN
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == IMAGE_TOKEN).int(),
        "pixel_values": noise(16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def spectrogram_inputs() -> dict[str, torch.Tensor]:
    return {"input_features": noise(2, 16, 128), **_decoder_inputs()}


def frames_inputs() -> dict[str, torch.Tensor]:
    return {"input_features": noise(2, 128, 16), **_decoder_inputs()}


def _decoder_inputs() -> dict[str, torch.Tensor]:
    return {"decoder_input_ids": text_inputs()["input_ids"][:, :7]}


def waveform_inputs() -> dict[str, torch.Tensor]:
    return {"input_values": noise(2, 1000)}


def structured(model: PreTrainedModel) -> PreTrainedModel:
    """Linear weights of which a part is of rank 4, as trained ones have large directions.

    With `--init pissa` at rank 4 the adapter holds that part, so an adapter that is not where it
    was planned shows in the outputs. Embeddings are as large as what layers add to them.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if type(module) is torch.nn.Embedding:
            module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator) / 2)
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            rows, columns = module.weight.shape
            directions = torch.randn(rows, 4, generator=generator)
            low_rank = directions @ torch.randn(4, columns, generator=generator) / 2
            weight = low_rank + torch.randn(rows, columns, generator=generator)
            fan_in = rows if type(module).__name__ == "Conv1D" else columns
            module.weight.data.copy_(weight * (0.5 / fan_in**0.5))
    return model


# What runs in float32 only, whoever quantized it.
ONLY_FLOAT32 = {"XLNet"}
# Adapters that no loss reaches: the class does not use what these layers give.
UNREACHED = {"SigLIP, classifier": "vision_model.head.", "BERT to BERT": "encoder.pooler."}


def entry(model: str, config: dict[str, Any], inputs: Inputs = text_inputs, **more: Any) -> Entry:
    """Of a class called ...For... or ...Model, whose config class has the same first name."""
    kind = more.pop("kind", None) or model.partition("For")[0].removesuffix("LMHeadModel")
    return Entry(model, f"{kind}Config", config, inputs, **more)


def llama_like(model: str, **config: Any) -> Entry:
    kind = config.pop("kind", model)
    return entry(f"{model}ForCausalLM", {**LLAMA_LIKE, **config}, kind=kind)


def mixture(model: str, **config: Any) -> Entry:
    return llama_like(model, **{**MIXTURE, **config})


def bert_like(model: str, kind: str | None = None, **config: Any) -> Entry:
    return entry(model, {**BERT_LIKE, **config}, kind=kind)


MLA = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
BART_LIKE = {**BATTERY["bart"].config, "decoder_start_token_id": 2}
SPEECH = {
    **BART_LIKE,
    "max_source_positions": 64,
    "max_target_positions": 64,
    "num_mel_bins": 16,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
WAVEFORM = {
    **BERT_LIKE,
    "vocab_size": 32,
    "conv_dim": (64, 64),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
BERT_PARTS = {"model_type": "bert", **BERT_LIKE}

ZOO: dict[str, Entry] = {
    # Decoders
    "Llama": BATTERY["llama"],
    "Mistral": BATTERY["mistral"],
    "Qwen2": BATTERY["qwen2"],
    "Qwen3": BATTERY["qwen3"],
    "Gemma 2": BATTERY["gemma2"],
    "Gemma 3": llama_like("Gemma3", kind="Gemma3Text", head_dim=16),
    "Gemma 3n": llama_like(
        "Gemma3n",
        kind="Gemma3nText",
        head_dim=16,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=32,
        altup_num_inputs=2,
        laurel_rank=32,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "Phi": llama_like("Phi"),
    "Phi-3": BATTERY["phi3"],
    "GPT-2": BATTERY["gpt2"],
    "GPT-J": entry(
        "GPTJForCausalLM",
        {**TEXT, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    ),
    "GPT-Neo": entry(
        "GPTNeoForCausalLM",
        {
            **TEXT,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    "GPT-NeoX": BATTERY["gpt_neox"],
    "GPT-BigCode": entry(
        "GPTBigCodeForCausalLM",
        {**TEXT, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "StarCoder2": llama_like("Starcoder2"),
    "OPT": BATTERY["opt"],
    "BLOOM": BATTERY["bloom"],
    "MPT": entry(
        "MptForCausalLM",
        {
            **TEXT,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "expansion_ratio": 2,
            "max_seq_len": 64,
        },
    ),
    "Falcon": BATTERY["falcon"],
    "StableLM": llama_like("StableLm"),
    "OLMo 2": llama_like("Olmo2"),
    "Cohere": llama_like("Cohere"),
    "Cohere 2": llama_like("Cohere2", head_dim=16),
    "Granite": llama_like("Granite"),
    "Nemotron": llama_like("Nemotron"),
    "GLM-4": llama_like("Glm4", head_dim=16),
    "SmolLM3": llama_like("SmolLM3"),
    "MiniCPM3": llama_like("MiniCPM3", **MLA),
    "ModernBERT decoder": bert_like("ModernBertDecoderForCausalLM"),
    "XLNet": entry(
        "XLNetLMHeadModel",
        {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128, "vocab_size": VOCABULARY},
    ),
    # Mixtures of experts
    "Mixtral": BATTERY["mixtral"],
    "Qwen2-MoE": BATTERY["qwen2_moe"],
    "Qwen3-MoE": mixture("Qwen3Moe", num_experts=4, head_dim=16),
    "Qwen3-MoE, dense layers": mixture("Qwen3Moe", num_experts=4, head_dim=16, mlp_only_layers=[0]),
    "DeepSeek-V2": mixture(
        "DeepseekV2", **MLA, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1
    ),
    "DeepSeek-V3": mixture(
        "DeepseekV3",
        **MLA,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "GLM-4-MoE": mixture(
        "Glm4Moe",
        head_dim=16,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "ERNIE 4.5 MoE": mixture("Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_num_shared_experts=1),
    "gpt-oss": mixture(
        "GptOss",
        head_dim=16,
        num_local_experts=4,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "OLMoE": mixture("Olmoe", num_experts=4),
    "FlexOlmo": mixture("FlexOlmo", num_experts=4),
    "Granite-MoE": mixture("GraniteMoe", num_local_experts=4),
    "Phi-3.5-MoE": mixture("Phimoe", num_local_experts=4),
    "Llama 4": mixture(
        "Llama4",
        kind="Llama4Text",
        head_dim=16,
        intermediate_size_mlp=128,
        num_local_experts=4,
        interleave_moe_layer_step=2,
    ),
    "dots.llm1": mixture(
        "Dots1",
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "HunYuan-MoE": mixture("HunYuanMoEV1", num_experts=4, moe_topk=2, head_dim=16),
    "MiniMax": mixture(
        "MiniMax",
        num_local_experts=4,
        head_dim=16,
        layer_types=["full_attention", "linear_attention"],
    ),
    "DBRX": entry(
        "DbrxForCausalLM",
        {
            **TEXT,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "LongCat-Flash": mixture(
        "LongcatFlash",
        **MLA,
        ffn_hidden_size=128,
        expert_ffn_hidden_size=64,
        n_routed_experts=4,
        moe_topk=2,
        zero_expert_num=2,
        num_layers=2,
        head_dim=16,
    ),
    # State spaces, recurrences and hybrids
    "Qwen3-Next": mixture(
        "Qwen3Next",
        num_experts=4,
        shared_expert_intermediate_size=64,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "Qwen3.5": llama_like(
        "Qwen3_5",
        kind="Qwen3_5Text",
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "Granite hybrid": mixture(
        "GraniteMoeHybrid",
        **MAMBA2,
        num_local_experts=4,
        shared_intermediate_size=64,
        layer_types=["mamba", "attention"],
    ),
    "Jamba": mixture(
        "Jamba",
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=16,
        mamba_dt_rank=64,
        use_mamba_kernels=False,
    ),
    "Bamba": llama_like("Bamba", **MAMBA2, attn_layer_indices=[1]),
    "Falcon-H1": llama_like("FalconH1", **MAMBA2, mamba_d_ssm=128, head_dim=16),
    "Zamba2": llama_like(
        "Zamba2",
        num_hidden_layers=4,
        num_key_value_heads=4,
        mamba_d_state=16,
        mamba_headdim=32,
        n_mamba_heads=4,
        mamba_ngroups=1,
        chunk_size=8,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        hybrid_layer_ids=[1, 3],
        num_mem_blocks=1,
        use_shared_attention_adapter=False,
        adapter_rank=32,
        use_mem_rope=False,
    ),
    "Nemotron-H": entry(
        "NemotronHForCausalLM",
        {
            **{k: v for k, v in LLAMA_LIKE.items() if k != "num_hidden_layers"},
            "head_dim": 16,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "LFM2": llama_like(
        "Lfm2", block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"]
    ),
    "LFM2-MoE": mixture(
        "Lfm2Moe", num_experts=4, num_dense_layers=1, layer_types=["conv", "full_attention"]
    ),
    "RecurrentGemma": llama_like(
        "RecurrentGemma",
        num_hidden_layers=3,
        num_key_value_heads=1,
        lru_width=64,
        attention_window_size=16,
    ),
    "Mamba": entry(
        "MambaForCausalLM", {**TEXT, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}
    ),
    "Falcon-Mamba": entry(
        "FalconMambaForCausalLM",
        {**TEXT, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16},
    ),
    "Mamba-2": entry(
        "Mamba2ForCausalLM",
        {
            **TEXT,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 16,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "RWKV": entry(
        "RwkvForCausalLM",
        {
            **TEXT,
            "hidden_size": 64,
            "attention_hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
        },
    ),
    # Encoders and decoders
    "T5": BATTERY["t5"],
    "mT5": entry(
        "MT5ForConditionalGeneration",
        {**BATTERY["t5"].config, "tie_word_embeddings": False},
        sequence_to_sequence_inputs,
    ),
    "BART": BATTERY["bart"],
    "BART, classifier": entry(
        "BartForSequenceClassification", {**BART_LIKE, "num_labels": 3}, ended_text_inputs
    ),
    "mBART": entry("MBartForConditionalGeneration", BART_LIKE, sequence_to_sequence_inputs),
    "Marian": entry("MarianMTModel", BART_LIKE, sequence_to_sequence_inputs, kind="Marian"),
    "Pegasus": entry("PegasusForConditionalGeneration", BART_LIKE, sequence_to_sequence_inputs),
    "BERT to BERT": Entry(
        "EncoderDecoderModel",
        "EncoderDecoderConfig",
        {
            "encoder": BERT_PARTS,
            "decoder": {**BERT_PARTS, "is_decoder": True, "add_cross_attention": True},
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
        },
        sequence_to_sequence_inputs,
    ),
    # Encoders
    "BERT": bert_like("BertForMaskedLM"),
    "BERT, classifier": BATTERY["bert"],
    "BERT, tokens": bert_like("BertForTokenClassification", num_labels=3),
    "BERT, questions": bert_like("BertForQuestionAnswering"),
    "BERT, embeddings": bert_like("BertModel", kind="Bert"),
    "RoBERTa": bert_like("RobertaForMaskedLM"),
    "ELECTRA": bert_like("ElectraForMaskedLM", embedding_size=64),
    "ELECTRA, discriminator": bert_like("ElectraForPreTraining", embedding_size=64),
    "DeBERTa-v2, classifier": BATTERY["deberta_v2"],
    "ALBERT": bert_like("AlbertForMaskedLM", embedding_size=64),
    "ESM": bert_like("EsmForMaskedLM", mask_token_id=3),
    "ModernBERT": bert_like("ModernBertForMaskedLM", cls_token_id=1, sep_token_id=2),
    "ModernBERT, classifier": bert_like(
        "ModernBertForSequenceClassification", cls_token_id=1, sep_token_id=2, num_labels=3
    ),
    "DistilBERT, classifier": entry(
        "DistilBertForSequenceClassification",
        {**TEXT, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "num_labels": 3},
    ),
    "Llama, classifier": entry(
        "LlamaForSequenceClassification", {**LLAMA_LIKE, "num_labels": 3}, kind="Llama"
    ),
    # Images
    "ViT, classifier": BATTERY["vit"],
    "CLIP, classifier": entry(
        "CLIPForImageClassification",
        {"vision_config": VISION, "text_config": BERT_LIKE, "num_labels": 5},
        image_inputs,
    ),
    "SigLIP, classifier": entry(
        "SiglipForImageClassification",
        {"vision_config": VISION, "text_config": BERT_LIKE, "num_labels": 5},
        image_inputs,
    ),
    "LLaVA": entry(
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **LLAMA_LIKE},
            "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": 64},
            "image_token_index": IMAGE_TOKEN,
        },
        image_and_text_inputs,
    ),
    "Qwen2-VL": entry(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **LLAMA_LIKE,
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            },
            "vision_config": {
                "depth": 2,
                "embed_dim": 64,
                "hidden_size": 64,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 8,
            },
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": VOCABULARY - 1,
            "vision_start_token_id": VOCABULARY - 3,
            "vision_end_token_id": VOCABULARY - 4,
        },
        patches_and_text_inputs,
    ),
    # Speech
    "Whisper": entry("WhisperForConditionalGeneration", SPEECH, spectrogram_inputs),
    "Speech2Text": entry(
        "Speech2TextForConditionalGeneration",
        {**SPEECH, "input_feat_per_channel": 16},
        frames_inputs,
    ),
    "Wav2Vec2, CTC": entry("Wav2Vec2ForCTC", WAVEFORM, waveform_inputs),
    "HuBERT, CTC": entry("HubertForCTC", WAVEFORM, waveform_inputs),
}
