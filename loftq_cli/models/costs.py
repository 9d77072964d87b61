"""What a LoRA adapter costs at each rank: parameters, and memory to fine-tune.

Notation: a linear layer is out × in, n = out·in; r the rank; T = batch size × sequence length
tokens in a step; V the vocabulary; all results are bytes.

    trainable parameters   r · (in + out), summed over the adapted layers (PEFT's own count)
    weights                n · bits / 8, summed over all linear layers that the container holds;
                           n · 2, and no scales, where training wants them dequantized
    absmax                 the container's scales: 4 · n / block size at 4 bits, 4 · out at 8 bits;
                           with zero points and the blocks of columns in gptq
    unquantized            2 a parameter: embeddings, head, norms, biases, what cannot be quantized
    adapter                4 a trainable parameter: PEFT keeps adapters in float32
    gradients              4 a trainable parameter
    optimizer              8 a trainable parameter: AdamW's two moments in float32
    activations            T · (Σ 2·(in + out) over all linear layers + Σ (4·in + 4·r) over the
                           adapted ones): what the backward pass keeps, that is every product's
                           input and output in 16 bits, and for A and B their inputs in float32
    logits                 T · V · 10: 2 the logits, 4 their log-softmax, 4 its gradient
    workspace              2 · n of the largest layer, if it is dequantized to be multiplied with
    context                600 MB: the CUDA context and the libraries' kernels, typically

With gradient checkpointing the activations are 2 · T · hidden size for each block, and those of
one block, which is computed again in the backward pass.

Of experts, whose tokens are few and not known, activations are not counted.

The counts are exact. The memory is an estimate: flash or memory-efficient attention, a base model
in 16 bits, no dropout. Against what autograd really keeps, its activations were 0.6 to 1.4 times
right over eight architectures (GPT-2, Llama, Qwen 3, Gemma 2, Phi-3, OPT, GPT-NeoX, BLOOM).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Protocol

from loftq_cli.models.layers import LinearLayer
from loftq_cli.models.outline import Outline
from loftq_cli.schema import MemoryEstimate

ADAPTER_ITEM_BYTES = 4
CONTEXT_BYTES = 600_000_000


class Held(Protocol):
    """How linear layers' weights are held: a container."""

    @property
    def quantizes(self) -> bool: ...
    @property
    def stays_packed(self) -> bool: ...
    def code_bits(self, bits: int) -> int: ...
    def scale_bytes(self, shape: tuple[int, int], bits: int) -> int: ...


def trainable_parameters(layers: Collection[LinearLayer], rank: int) -> int:
    """Parameters of A (r × in) and B (out × r) for each of the layers."""
    return rank * sum(layer.in_features + layer.out_features for layer in layers)


def memory(
    outline: Outline,
    adapted: Sequence[LinearLayer],
    rank: int,
    *,
    held: Held,
    bits: int,
    tokens: int,
) -> MemoryEstimate:
    """The memory of one fine-tuning step with adapters of this rank on ``adapted``.

    The model is held in codes of ``bits``, and ``tokens`` go through it in the step.
    """
    layers = outline.layers
    elements = sum(layer.parameters for layer in layers)
    trainable = trainable_parameters(adapted, rank)
    passed = [layer for layer in layers if not layer.expert]
    kept = {layer.module: 2 * (layer.in_features + layer.out_features) for layer in passed}
    for layer in adapted:
        if layer.expert:
            continue
        kept[layer.module] += 4 * layer.in_features + 4 * rank
    blocks: Counter[str] = Counter()
    for module, size in kept.items():
        blocks[_block(module)] += size
    largest = max((layer.parameters for layer in layers), default=0)
    activations = tokens * sum(kept.values())
    checkpointed = 2 * _hidden_size(passed) * len(blocks) + max(blocks.values(), default=0)
    terms = {
        "weights_bytes": elements * held.code_bits(bits) // 8,
        "absmax_bytes": sum(
            held.scale_bytes((each.out_features, each.in_features), bits) for each in layers
        ),
        "unquantized_bytes": 2 * (outline.parameters - elements),
        "adapter_bytes": ADAPTER_ITEM_BYTES * trainable,
        "gradients_bytes": 4 * trainable,
        "optimizer_bytes": 8 * trainable,
        "logits_bytes": 10 * tokens * outline.vocabulary,
        "workspace_bytes": 2 * largest * held.quantizes,
        "context_bytes": CONTEXT_BYTES,
    }
    if not held.stays_packed:
        terms |= {"weights_bytes": 2 * elements, "absmax_bytes": 0, "workspace_bytes": 0}
    others = sum(terms.values())
    return MemoryEstimate(
        **terms,
        activations_bytes=activations,
        activations_with_checkpointing_bytes=tokens * checkpointed,
        total_bytes=others + activations,
        total_with_checkpointing_bytes=others + tokens * checkpointed,
    )


def _block(module: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.3: what is checkpointed as one."""
    parts = module.split(".")
    numbered = (n for n, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: next(numbered, 0) + 1])


def _hidden_size(layers: Sequence[LinearLayer]) -> int:
    """The width of the residual stream: what most layers read."""
    widths = Counter(layer.in_features for layer in layers)
    return widths.most_common(1)[0][0] if widths else 0
