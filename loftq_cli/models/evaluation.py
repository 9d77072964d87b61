"""How far a model is from its original: KL divergence and perplexity over windows of text.

Both are over the tokens that are predicted, which are all of a window but its first:

    KL = mean of Σ_v p(v)·(log p(v) − log q(v))      p the original's probabilities, q the model's
    perplexity = exp(mean of −log q(the token that comes))

in nats. The original's logits are kept only where they are small; else it runs beside the model,
batch by batch: for 32,768 tokens and a vocabulary of 128,000 they would take 17 GB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.models.architecture import Architecture

# More tokens hardly change the figures; fewer leave them to chance.
MOST_TOKENS = 32_768
# Logits of one batch, and those taken into float32 at once: 256 and 64 MiB.
_LOGITS = 1 << 26
_LOGITS_AT_ONCE = 1 << 24
KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of some windows.

    ``window_losses`` has the mean loss of each window in nats a token, for comparing two models
    window by window. ``kl_divergence`` is None where there was no original to hold it against.
    """

    window_losses: tuple[float, ...]
    kl_divergence: float | None

    @property
    def loss(self) -> float:
        """Mean loss in nats a token; windows are all of one length."""
        return math.fsum(self.window_losses) / len(self.window_losses)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is more than a float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def finite(value: float | None) -> float | None:
    """For documents, which have no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def require_causal(architecture: Architecture) -> None:
    """Refuses models whose next token cannot be asked for.

    Raises:
        UnsupportedModel: no causal language-model head.
    """
    name = architecture.class_name
    hint = "choose a causal language model, such as --model demo"
    if architecture.model.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{name} is an encoder-decoder: it cannot be compared",
            cause="it answers a text, and predicts nothing of the text itself",
            hint=hint,
        )
    if architecture.task_type != "CAUSAL_LM":
        raise UnsupportedModel(
            f"{name} does not predict the next token",
            cause="without a language-model head there are no KL and no perplexity",
            hint=hint,
        )


class Reference:
    """What the original makes of some windows (n × length)."""

    def __init__(self, model: Any, windows: Tensor) -> None:
        self.model = model
        values = windows.numel() * _vocabulary(model)
        self._kept: dict[int, Tensor] | None = {} if 4 * values <= KEPT_BYTES else None

    def logits(self, first: int, batch: Tensor) -> Tensor:
        """(predicted tokens × vocabulary) of the batch that begins at window ``first``."""
        if self._kept is None:
            return _logits(self.model, batch)
        if first not in self._kept:
            self._kept[first] = _logits(self.model, batch).cpu()
        return self._kept[first]


def evaluate(model: Any, windows: Tensor, reference: Reference | None = None) -> Evaluation:
    """Runs ``windows`` (n × length) through a model, and holds it against the original.

    The mode (training or evaluation) is left as it is; nothing is kept for gradients.

    Raises:
        UnsupportedModel: the two models do not have the same tokens.
    """
    import torch

    losses: list[Tensor] = []
    divergence, first = 0.0, 0
    # Not `inference_mode`: a model that is evaluated while it trains must go on training.
    with torch.no_grad():
        for batch in windows.split(_batch_size(model, windows.shape[1])):
            other = None if reference is None else reference.logits(first, batch)
            if other is not None and reference is not None and reference.model is model:
                logits = other  # the original itself, which need not run twice
            else:
                logits = _logits(model, batch)
            if other is not None and other.shape != logits.shape:
                raise UnsupportedModel(
                    "the two models do not have the same tokens",
                    cause=f"{logits.shape[-1]} and {other.shape[-1]} of them",
                )
            each, diverged = _token_losses(logits, other, batch[:, 1:].flatten())
            losses.append(each.view(len(batch), -1).mean(1))
            divergence += diverged
            first += len(batch)
    return Evaluation(
        window_losses=tuple(torch.cat(losses).tolist()),
        kl_divergence=None if reference is None else divergence / windows[:, 1:].numel(),
    )


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _batch_size(model: Any, length: int) -> int:
    """As many windows as the logits of a batch may take; 16 keep any processor busy."""
    return min(16, max(1, _LOGITS // (_vocabulary(model) * length)))


def _logits(model: Any, batch: Tensor) -> Tensor:
    """(predicted tokens × vocabulary), of all tokens but the last of each window."""
    # Nothing is generated: keys and values of earlier tokens need not be kept.
    found: Tensor = model(input_ids=batch.to(model.device), use_cache=False).logits
    return found[:, :-1].flatten(0, 1)


def _token_losses(
    logits: Tensor, reference: Tensor | None, targets: Tensor
) -> tuple[Tensor, float]:
    """Loss of each token in float64 on the CPU, and the sum of their KL divergences."""
    import torch

    targets = targets.to(logits.device)
    rows = max(1, _LOGITS_AT_ONCE // logits.shape[1])
    losses, divergence = [], 0.0
    for first in range(0, len(logits), rows):
        part = slice(first, first + rows)
        log_q = logits[part].float().log_softmax(-1)
        losses.append(-log_q.gather(1, targets[part, None])[:, 0].double().cpu())
        if reference is not None:
            log_p = reference[part].to(log_q.device).float().log_softmax(-1)
            terms = log_p.exp().mul_(log_p - log_q)
            # What the original rules out (p = 0, log p = −∞) adds nothing.
            divergence += float(terms.masked_fill_(log_p.isneginf(), 0).sum(-1).double().sum())
    return torch.cat(losses), divergence
