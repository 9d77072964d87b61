"""Adapters trained on a text until the quantized model predicts what the original does.

Teacher and student are one model: as it is, and with Q·x + s·B·(A·x) in its quantized layers. Q
stays as it is, A and B are float32 and trained with AdamW. The loss of a step is the mean over its
tokens of

    Σ_v p(v)·(log p(v) − log q(v))      p the teacher's probabilities, q the student's

Rate and length of windows were measured: see `--distill-steps` in examples/RESULTS.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from loftq_cli.errors import LoftqError
from loftq_cli.models.evaluation import Reference, evaluate
from loftq_cli.models.layerwise import replaced
from loftq_cli.models.quantized_layers import QuantizedLayer, quantized_forwards

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Windows in a step, and tokens in a window.
BATCH, WINDOW_LENGTH = 8, 192
# The highest of one cycle. At 5e-4 two of three models ended farther away in NF4 than they began.
LEARNING_RATE = 2e-4
# So many windows are looked at before and after.
EVALUATED = 32
# A hint: layers that are finished by then belong to a run with other settings.
WITHOUT = (
    "look at the model's own output on this text; or leave --distill-steps out and add --force, "
    "which makes the layers anew"
)


class Distilled(NamedTuple):
    """A and B of each adapted layer on the CPU, and KL divergences before and after."""

    adapters: dict[str, tuple[Tensor, Tensor]]
    kl_before: float
    kl_after: float


class _Student:
    """A model whose layers compute what they have become, for `evaluate`."""

    def __init__(self, model: Any, forwards: dict[str, Callable[..., Any]]) -> None:
        self._model = model
        self._forwards = forwards
        self.config = model.config
        self.device = model.device

    def __call__(self, **inputs: Any) -> Any:
        with replaced(self._model, self._forwards):
            return self._model(**inputs)


def distill(
    model: Any,
    layers: Iterable[tuple[str, QuantizedLayer]],
    windows: Tensor,
    *,
    steps: int,
    seed: int,
    dtype: torch.dtype,
    tell: Callable[[], None] = lambda: None,
) -> Distilled:
    """Trains the adapters of ``layers``; the same arguments give the same bits on one machine.

    Args:
        model: the original, in evaluation mode. None of its parameters takes gradients afterwards.
        layers: its quantized layers by their paths, each taken once.
        windows: token ids (n × length); they come in a new order whenever all have been seen.
        dtype: what A and B are rounded to in the end.
        tell: called after each step.

    Raises:
        LoftqError: one of the models predicts no numbers, before the first step.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model.requires_grad_(requires_grad=False)
    device = model.device
    forwards: dict[str, Callable[..., Any]] = {}
    adapters: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers:
        if layer.adapter is not None:
            A, B = (
                factor.detach().to(device, torch.float32, copy=True).requires_grad_()
                for factor in layer.adapter
            )
            adapters[name] = A, B
            layer = replace(layer, adapter=(A, B))
        forwards |= quantized_forwards(model, {name: layer}, str(device))
    student = _Student(model, forwards)
    chosen = torch.linspace(0, len(windows) - 1, min(len(windows), EVALUATED)).round().long()
    reference = Reference(model, windows[chosen])

    def divergence() -> float:
        return evaluate(student, windows[chosen], reference).kl_divergence or 0.0

    before = divergence()
    if not math.isfinite(before):
        raise LoftqError(
            "the adapters cannot be distilled on this text",
            cause=f"the KL divergence on it is {before:g} before the first step",
            hint=WITHOUT,
        )
    trained = [factor for pair in adapters.values() for factor in pair]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)
    batches = _batches(windows, seed)
    # The backward passes of the faster kernels add up in any order on a GPU.
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        for _ in range(steps):
            batch = {"input_ids": next(batches).to(device), "use_cache": False}
            with torch.no_grad():
                log_p = model(**batch).logits.flatten(0, 1).float().log_softmax(-1)
            log_q = student(**batch).logits.flatten(0, 1).float().log_softmax(-1)
            terms = log_p.exp() * (log_p - log_q)
            # What the original rules out (p = 0, log p = −∞) adds nothing.
            (terms.masked_fill(log_p.isneginf(), 0).sum() / len(log_p)).backward()
            optimizer.step()
            optimizer.zero_grad()
            cycle.step()
            tell()
    with torch.no_grad():
        for factor in trained:
            factor.copy_(factor.to(dtype))
    made = {name: (A.detach().cpu(), B.detach().cpu()) for name, (A, B) in adapters.items()}
    return Distilled(made, before, divergence())


def _batches(windows: Tensor, seed: int) -> Iterator[Tensor]:
    """So many windows at a time, in one random order after the other."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(windows), generator=generator)])
        yield windows[order[:BATCH]]
        order = order[BATCH:]
