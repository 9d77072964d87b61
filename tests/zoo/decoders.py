"""Causal models of dense layers."""

from __future__ import annotations

from tests.zoo.making import (
    BART_LIKE,
    BATTERY,
    GPT_LIKE,
    LLAMA_LIKE,
    MLA,
    TEXT,
    VOCABULARY,
    decoder,
    encoder,
    entry,
)

XLNET = {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128, "vocab_size": VOCABULARY}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
PER_LAYER = {  # embeddings for each layer
    **SLIDING,
    "head_dim": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 32,
    "num_kv_shared_layers": 0,
}
GEMMA_3N = {
    **PER_LAYER,
    "altup_num_inputs": 2,
    "laurel_rank": 32,
    "activation_sparsity_pattern": [0.0, 0.0],
    "intermediate_size": [128, 128],
}

DECODERS = {
    "Llama": BATTERY["llama"],
    "Llama, classifier": entry("LlamaForSequenceClassification", {**LLAMA_LIKE, "num_labels": 3}),
    "Llama, tokens": entry("LlamaForTokenClassification", {**LLAMA_LIKE, "num_labels": 3}),
    "Llama, embeddings": entry("LlamaModel", LLAMA_LIKE),
    "Mistral": BATTERY["mistral"],
    "Qwen2": BATTERY["qwen2"],
    "Qwen3": BATTERY["qwen3"],
    "Gemma": decoder("Gemma", head_dim=16),
    "Gemma 2": BATTERY["gemma2"],
    "Gemma 3": decoder("Gemma3", "Gemma3Text", head_dim=16),
    "Gemma 3n": decoder("Gemma3n", "Gemma3nText", **GEMMA_3N),
    "Gemma 4": decoder("Gemma4", "Gemma4Text", **PER_LAYER, global_head_dim=16),
    "Phi": decoder("Phi"),
    "Phi-3": BATTERY["phi3"],
    "GPT": entry("OpenAIGPTLMHeadModel", GPT_LIKE),
    "GPT-2": BATTERY["gpt2"],
    "GPT-2, classifier": entry("GPT2ForSequenceClassification", {**GPT_LIKE, "num_labels": 3}),
    "GPT-J": entry("GPTJForCausalLM", {**GPT_LIKE, "rotary_dim": 8}),
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
    "GPT-BigCode": entry("GPTBigCodeForCausalLM", GPT_LIKE),
    "CodeGen": entry("CodeGenForCausalLM", {**GPT_LIKE, "rotary_dim": 8}),
    "StarCoder2": decoder("Starcoder2"),
    "OPT": BATTERY["opt"],
    "BLOOM": BATTERY["bloom"],
    "MPT": entry(
        "MptForCausalLM", {**TEXT, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
    ),
    "Falcon": BATTERY["falcon"],
    "StableLM": decoder("StableLm"),
    "OLMo": decoder("Olmo"),
    "OLMo 2": decoder("Olmo2"),
    "OLMo 3": decoder("Olmo3", **SLIDING),
    "Cohere": decoder("Cohere"),
    "Cohere 2": decoder("Cohere2", head_dim=16),
    "Granite": decoder("Granite"),
    "Nemotron": decoder("Nemotron"),
    "GLM-4": decoder("Glm4", head_dim=16),
    "EXAONE 4": decoder("Exaone4", head_dim=16),
    "Seed-OSS": decoder("SeedOss", head_dim=16),
    "Apertus": decoder("Apertus"),
    "SmolLM3": decoder("SmolLM3"),
    "MiniCPM3": decoder("MiniCPM3", **MLA),
    "BioGPT": encoder("BioGptForCausalLM"),
    "XGLM": entry(
        "XGLMForCausalLM",
        {**TEXT, "d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4},
    ),
    "CTRL": entry("CTRLLMHeadModel", {**GPT_LIKE, "dff": 128}),
    "XLNet": entry("XLNetLMHeadModel", XLNET),
    "XLNet, classifier": entry("XLNetForSequenceClassification", {**XLNET, "num_labels": 3}),
    "ModernBERT decoder": encoder("ModernBertDecoderForCausalLM"),
    "BART decoder": entry("BartForCausalLM", {**BART_LIKE, "is_encoder_decoder": False}),
}
