"""Opens a written directory as its users will, and takes it apart again.

Nothing of `loftq_cli` is used here: what is checked is what plain transformers, bitsandbytes and
PEFT make of the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Reloaded:
    """The model with its adapter, and each quantized layer as float64 matrices (out, in)."""

    model: PeftModel
    dequantized: dict[str, torch.Tensor]
    correction: dict[str, torch.Tensor]  # s·B·A, adapted layers only


def reload(
    directory: Path, model_class: str = "AutoModelForCausalLM", adapter: Path | None = None
) -> Reloaded:
    """The two lines of the README, then every layer's Q and s·B·A as the libraries hold them.

    The adapter is that in the directory unless another is given.
    """
    base = getattr(transformers, model_class).from_pretrained(directory)
    model = PeftModel.from_pretrained(base, adapter or directory / "loftq_init", is_trainable=True)
    return Reloaded(model.eval(), *take_apart(model))


def take_apart(model: PeftModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Q and s·B·A of each layer as a model holds them, the latter of its one active adapter."""
    dequantized, correction = {}, {}
    for name, module in model.base_model.model.named_modules():
        inner = getattr(module, "base_layer", module)
        name = name.removesuffix(".base_layer")
        if isinstance(inner, bnb.nn.Linear4bit):
            state = inner.weight.quant_state
            dequantized[name] = bnb.functional.dequantize_4bit(inner.weight.data, state).double()
        elif isinstance(inner, bnb.nn.Linear8bitLt):
            dequantized[name] = bnb.functional.int8_vectorwise_dequant(
                inner.weight.data, inner.weight.SCB
            ).double()
        if hasattr(module, "lora_A"):
            (adapter,) = module.active_adapters
            A = module.lora_A[adapter].weight.detach().double()
            B = module.lora_B[adapter].weight.detach().double()
            correction[name] = module.scaling[adapter] * (B @ A)
    return dequantized, correction


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Each linear layer's original weight as float64 (out, in), also where it is a Conv1D."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[name] = module.weight.detach().double()
        elif isinstance(module, transformers.pytorch_utils.Conv1D):
            found[name] = module.weight.detach().double().T
    return found


def relative_error(W: torch.Tensor, approximation: torch.Tensor) -> float:
    return float((W - approximation).norm() / W.norm())
