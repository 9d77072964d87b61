"""Mixtures of experts, and what keeps a state instead of attending."""

from __future__ import annotations

from tests.zoo.making import (
    BATTERY,
    DELTA_NET,
    DENSE_THEN_SPARSE,
    LLAMA_LIKE,
    MAMBA2,
    MLA,
    ROUTED,
    TEXT,
    decoder,
    entry,
    experts,
)

STATES = {**TEXT, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}
ZAMBA = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "mamba_d_state": 16,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
}

MIXTURES = {
    "Mixtral": BATTERY["mixtral"],
    "Qwen2-MoE": BATTERY["qwen2_moe"],
    "Qwen3-MoE": experts("Qwen3Moe", num_experts=4, head_dim=16),
    "Qwen3-MoE, dense layers": experts("Qwen3Moe", num_experts=4, head_dim=16, mlp_only_layers=[0]),
    "DeepSeek-V2": experts("DeepseekV2", **MLA, **ROUTED, **DENSE_THEN_SPARSE),
    "DeepSeek-V3": experts("DeepseekV3", **MLA, **ROUTED, **DENSE_THEN_SPARSE),
    "DeepSeek-V3.2": experts(
        "DeepseekV32",
        **MLA,
        **ROUTED,
        **DENSE_THEN_SPARSE,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=8,
    ),
    "GLM-4-MoE": experts("Glm4Moe", **ROUTED, **DENSE_THEN_SPARSE, head_dim=16),
    "GLM-4-MoE-Lite": experts("Glm4MoeLite", **MLA, **ROUTED, **DENSE_THEN_SPARSE),
    "dots.llm1": experts("Dots1", **ROUTED, **DENSE_THEN_SPARSE),
    "ERNIE 4.5 MoE": experts("Ernie4_5_Moe", moe_num_experts=4, moe_k=2, moe_num_shared_experts=1),
    "gpt-oss": experts(
        "GptOss",
        head_dim=16,
        num_local_experts=4,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "OLMoE": experts("Olmoe", num_experts=4),
    "FlexOlmo": experts("FlexOlmo", num_experts=4),
    "Granite-MoE": experts("GraniteMoe", num_local_experts=4),
    "Granite-MoE, shared": experts(
        "GraniteMoeShared", num_local_experts=4, shared_intermediate_size=64
    ),
    "Phi-3.5-MoE": experts("Phimoe", num_local_experts=4),
    "Llama 4": experts(
        "Llama4",
        "Llama4Text",
        head_dim=16,
        intermediate_size_mlp=128,
        num_local_experts=4,
        interleave_moe_layer_step=2,
    ),
    "HunYuan-MoE": experts("HunYuanMoEV1", num_experts=4, moe_topk=2, head_dim=16),
    "MiniMax": experts(
        "MiniMax",
        num_local_experts=4,
        head_dim=16,
        layer_types=["full_attention", "linear_attention"],
    ),
    "MiniMax-M2": experts("MiniMaxM2", num_local_experts=4, head_dim=16),
    "AFMoE": experts(
        "Afmoe",
        num_experts=4,
        num_shared_experts=1,
        num_dense_layers=1,
        head_dim=16,
        n_group=1,
        topk_group=1,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "JetMoE": experts("JetMoe", num_local_experts=4, kv_channels=16),
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
    "LongCat-Flash": experts(
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
}

RECURRENT = {
    "Qwen3-Next": experts(
        "Qwen3Next", **DELTA_NET, num_experts=4, shared_expert_intermediate_size=64
    ),
    "Qwen3.5": decoder("Qwen3_5", "Qwen3_5Text", **DELTA_NET),
    "Qwen3.5-MoE": experts(
        "Qwen3_5Moe",
        "Qwen3_5MoeText",
        **DELTA_NET,
        num_experts=4,
        shared_expert_intermediate_size=64,
    ),
    "Granite hybrid": experts(
        "GraniteMoeHybrid",
        **MAMBA2,
        num_local_experts=4,
        shared_intermediate_size=64,
        layer_types=["mamba", "attention"],
    ),
    "Jamba": experts(
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
    "Bamba": decoder("Bamba", **MAMBA2, attn_layer_indices=[1]),
    "Falcon-H1": decoder("FalconH1", **MAMBA2, mamba_d_ssm=128, head_dim=16),
    "Zamba": decoder("Zamba", **ZAMBA, mamba_dt_rank=64, n_mamba_heads=2, use_mamba_kernels=False),
    "Zamba2": decoder(
        "Zamba2",
        **ZAMBA,
        mamba_headdim=32,
        n_mamba_heads=4,
        mamba_ngroups=1,
        chunk_size=8,
        hybrid_layer_ids=[1, 3],
        num_mem_blocks=1,
        use_shared_attention_adapter=False,
        adapter_rank=32,
        use_mem_rope=False,
    ),
    "Nemotron-H": entry(
        "NemotronHForCausalLM",
        {
            **{name: each for name, each in LLAMA_LIKE.items() if name != "num_hidden_layers"},
            "head_dim": 16,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 32,
            "mamba_head_dim": 4,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "LFM2": decoder("Lfm2", block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"]),
    "LFM2-MoE": experts(
        "Lfm2Moe", num_experts=4, num_dense_layers=1, layer_types=["conv", "full_attention"]
    ),
    "RecurrentGemma": decoder(
        "RecurrentGemma",
        num_hidden_layers=3,
        num_key_value_heads=1,
        lru_width=64,
        attention_window_size=16,
    ),
    "Mamba": entry("MambaForCausalLM", STATES),
    "Falcon-Mamba": entry("FalconMambaForCausalLM", STATES),
    "Mamba-2": entry(
        "Mamba2ForCausalLM",
        {**STATES, "num_heads": 32, "head_dim": 4, "n_groups": 1, "chunk_size": 8},
    ),
    "RWKV": entry("RwkvForCausalLM", {**STATES, "attention_hidden_size": 64}),
}
