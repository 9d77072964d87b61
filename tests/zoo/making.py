"""What the entries of the zoo are made of: small configurations, inputs, weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.battery import BATTERY, BERT_LIKE, LLAMA_LIKE, MIXTURE, TEXT, VOCABULARY, Entry
from tests.battery import image_inputs as image
from tests.battery import sequence_to_sequence_inputs as text_to_text
from tests.battery import text_inputs as text

__all__ = ["BATTERY", "BERT_LIKE", "LLAMA_LIKE", "TEXT", "VOCABULARY", "Entry"]
__all__ += ["image", "text", "text_to_text"]

Inputs = Callable[[], dict[str, torch.Tensor]]
IMAGE_TOKEN = VOCABULARY - 2
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
GPT_LIKE = {**TEXT, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
BART_LIKE = {**BATTERY["bart"].config, "decoder_start_token_id": 2}
T5_LIKE = BATTERY["t5"].config
MLA = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
MAMBA2 = {"mamba_n_heads": 32, "mamba_d_head": 4, "mamba_d_state": 16, "mamba_chunk_size": 8}
DELTA_NET = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
DENSE_THEN_SPARSE = {"first_k_dense_replace": 1}


def entry(model: str, config: dict[str, Any], inputs: Inputs = text, kind: str = "") -> Entry:
    """Of a class called …For… or …Model; the config class begins like it, or like ``kind``."""
    named = model.partition("For")[0].removesuffix("LMHeadModel").removesuffix("Model")
    return Entry(model, f"{kind or named}Config", config, inputs)


def decoder(model: str, kind: str = "", **config: Any) -> Entry:
    """A causal model whose config has Llama's names."""
    return entry(f"{model}ForCausalLM", {**LLAMA_LIKE, **config}, kind=kind or model)


def experts(model: str, kind: str = "", **config: Any) -> Entry:
    """The same with two of four experts a token."""
    return decoder(model, kind, **{**MIXTURE, **config})


def encoder(model: str, kind: str = "", inputs: Inputs = text, **config: Any) -> Entry:
    """A model whose config has BERT's names."""
    return entry(model, {**BERT_LIKE, **config}, inputs, kind)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def giving(**inputs: Callable[[], torch.Tensor]) -> Inputs:
    """Inputs that are made when they are asked for."""
    return lambda: {name: make() for name, make in inputs.items()}


def answering(**inputs: Callable[[], torch.Tensor]) -> Inputs:
    """The same, and the beginning of what a decoder says to them."""
    return lambda: {**giving(**inputs)(), "decoder_input_ids": text()["input_ids"][:, :7]}


def ended_text() -> dict[str, torch.Tensor]:
    """Some classes look where a text ends."""
    inputs = text()
    inputs["input_ids"][:, -1] = TEXT["eos_token_id"]
    return inputs


def text_with_image(tokens: int, *shape: int, **more: Callable[[], torch.Tensor]) -> Inputs:
    """An image that takes the place of so many tokens."""

    def make() -> dict[str, torch.Tensor]:
        inputs = {name: each.repeat(1, 2) for name, each in text().items()}
        inputs["input_ids"][:, 2 : 2 + tokens] = IMAGE_TOKEN
        return {**inputs, "pixel_values": noise(*(shape or (2, 3, 32, 32))), **giving(**more)()}

    return make


def text_with_patches() -> dict[str, torch.Tensor]:
    """Qwen2-VL's: an image of 4 × 4 patches, of which 2 × 2 are a token."""
    inputs = {name: each[:1].clone() for name, each in text().items()}
    inputs["input_ids"][:, 2:6] = IMAGE_TOKEN
    return {
        **inputs,
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).int(),
        "pixel_values": noise(16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def structured(model: PreTrainedModel) -> PreTrainedModel:
    """Linear weights of which a part is of rank 4, as trained ones have large directions.

    With `--init pissa` at rank 4 the adapter holds that part, so an adapter that is not where it
    was planned shows in the outputs. Embeddings are as large as what layers add to them, and a
    gate or a projection that begins at zero lets something through.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        weighs = parameter.ndim == 2 or "gate" in name or "scale" in name
        if weighs and not parameter.any():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
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
