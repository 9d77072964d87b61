"""What a comparison says, in sentences that follow from its figures, also where that is "no gain".

Distances are KL divergences. Trained starts are compared window by window of the held-out text:
the standard error of the mean difference says what another text of the kind could have given. It
does not say what another seed or learning rate could have given (a start that puts much of the
weights into the adapter takes larger steps at the same rate), and the verdict says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loftq_cli import starts
from loftq_cli.report import units
from loftq_cli.schema import BitsVerdict, ComparedMethod, CompareVerdict
from loftq_cli.starts import Start

# Nearer by less than this is no gain.
WORTHWHILE_SHARE = 0.02
# Standard errors that a difference in loss has to exceed.
_ERRORS = 2.0

Key = tuple[str, int, int | None]
Losses = Mapping[Key, Sequence[float]]


def key(method: ComparedMethod) -> Key:
    """What tells a method from the others of a comparison."""
    return method.init, method.bits, method.rank


def relative_to_qlora(methods: Sequence[ComparedMethod]) -> list[ComparedMethod]:
    """The methods, with what each gains over QLoRA at the same bits and rank."""
    found = []
    for method in methods:
        plain = _alike(methods, starts.QLORA, method)
        if plain is not None:
            kept = _ratio(method.weight_error_relative, plain.weight_error_relative)
            gains = {
                "error_removed": None if kept is None else 1 - kept,
                "kl_gain": _ratio(plain.kl_divergence, method.kl_divergence),
            }
            method = method.model_copy(update=gains)
        found.append(method)
    return found


def verdict(methods: Sequence[ComparedMethod], losses: Losses) -> CompareVerdict:
    """The verdict; ``losses`` has the held-out losses of every window after training, if any."""
    quantized = [
        method
        for method in methods
        if method.rank is not None and starts.of_report(method.init).quantizes
    ]
    parts = []
    for bits in dict.fromkeys(each.bits for each in quantized):
        here = [each for each in quantized if each.bits == bits]
        parts.append(_by_distance(here))
        if losses:
            trained = _by_training(here, methods, losses)
            sentence = f"{parts[-1].sentence} {trained['sentence']}"
            parts[-1] = parts[-1].model_copy(update=trained | {"sentence": sentence})
    sentences = [part.sentence for part in parts]
    if losses:
        sentences.append("One seed and one learning rate: others may order the starts otherwise.")
    return CompareVerdict(sentence=" ".join(sentences), bits=parts)


def _by_distance(here: Sequence[ComparedMethod]) -> BitsVerdict:
    """Where starts of one number of bits begin: which is nearest, and by how much."""
    # Ties go to the one that comes first, which is QLoRA.
    best = min(here, key=lambda each: _or_infinite(each.kl_divergence))
    qlora, published = (_alike(here, each, best) for each in (starts.QLORA, starts.PUBLISHED))
    assert qlora is not None
    assert best.rank is not None
    worse = [each for each in (qlora, published) if each is not None and each is not best]
    nearest = _or_infinite(best.kl_divergence)
    gain = nearest < (1 - WORTHWHILE_SHARE) * _or_infinite(qlora.kl_divergence)
    shown = _shown(best.kl_divergence)
    if best.kl_divergence is None:
        sentence = "nothing can be said: no KL divergence is a number."
    elif best is qlora:
        sentence = f"no gain here: no start is nearer to the original than QLoRA (KL {shown})."
    elif gain:
        against = " and ".join(_times_nearer(best, other) for other in worse)
        sentence = f"{_placed(best)} is nearest to the original: KL {shown}, {against}."
    else:
        sentence = (
            f"no gain here: the nearest start, {_placed(best)}, has KL {shown}, within "
            f"{100 * WORTHWHILE_SHARE:.0f} % of QLoRA's {_shown(qlora.kl_divergence)}."
        )
    return BitsVerdict(
        bits=best.bits,
        init=best.init,
        rank=best.rank,
        gain=gain,
        kl_gain=best.kl_gain,
        kl_gain_over_plain_loftq=(
            _ratio(published.kl_divergence, best.kl_divergence) if published in worse else None
        ),
        sentence=f"At {best.bits} bits {sentence}",
    )


def _by_training(
    here: Sequence[ComparedMethod], methods: Sequence[ComparedMethod], losses: Losses
) -> dict[str, Any]:
    """Where the same starts ended, as fields of a `BitsVerdict`."""
    best = min(here, key=lambda each: _or_infinite(each.heldout_loss_after))
    qlora = _alike(here, starts.QLORA, best)
    assert qlora is not None
    if qlora.heldout_loss_after is None or best.heldout_loss_after is None:
        return {"sentence": "Trained, nothing can be said: the training of QLoRA diverged."}
    aside = ""
    for each in methods:
        alike = (each.init, each.rank) == (starts.LORA.name, best.rank)
        if alike and each.heldout_loss_after is not None:
            aside = f"; 16-bit LoRA ends at {each.heldout_loss_after:.4f}"
    margin, error, clear = None, None, False
    if best is qlora:
        text = f"Trained, no start ends below QLoRA ({qlora.heldout_loss_after:.4f}){aside}."
    else:
        margin, error = difference(losses[key(qlora)], losses[key(best)])
        clear = error is not None and margin > _ERRORS * error
        text = (
            f"Trained, {_placed(best)} ends lowest at a held-out loss of "
            f"{best.heldout_loss_after:.4f}, {margin:.4f} below QLoRA"
        )
        text += "" if error is None else f" (standard error {error:.4f})"
        text += f"{aside}." if clear else f", which is within the noise: no gain here{aside}."
    return {
        "trained_init": best.init,
        "trained_rank": best.rank,
        "trained_margin": margin,
        "trained_margin_error": error,
        "trained_gain": clear,
        "sentence": text,
    }


def difference(high: Sequence[float], low: Sequence[float]) -> tuple[float, float | None]:
    """Mean of high − low and its standard error; None where one pair tells nothing of it."""
    each = [one - two for one, two in zip(high, low, strict=True)]
    mean = math.fsum(each) / len(each)
    if len(each) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in each) / (len(each) - 1)
    return mean, math.sqrt(variance / len(each))


def _alike(
    methods: Sequence[ComparedMethod], start: Start, like: ComparedMethod
) -> ComparedMethod | None:
    """The method with this start at the bits and rank of another."""
    wanted = (start.name, like.bits, like.rank)
    return next((each for each in methods if key(each) == wanted), None)


def _placed(method: ComparedMethod) -> str:
    return f"{starts.of_report(method.init).label} at rank {method.rank}"


def _times_nearer(best: ComparedMethod, other: ComparedMethod) -> str:
    name, shown = starts.of_report(other.init).label, _shown(other.kl_divergence)
    ratio = _ratio(other.kl_divergence, best.kl_divergence)
    if ratio is None:
        return f"that of {name} {shown}"
    return f"{units.significant(ratio)} × nearer than {name} ({shown})"


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _shown(value: float | None) -> str:
    return "is no number" if value is None else units.small(value)
