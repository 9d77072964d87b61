"""What a comparison says, in sentences that follow from its figures, also where that is "no gain".

Distances are KL divergences. Trained starts are compared window by window of the held-out text:
the standard error of the mean difference says what another text of the kind could have given. It
does not say what another seed or learning rate could have given (a start that puts much of the
weights into the adapter takes larger steps at the same rate), and the verdict says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
        plain = _find(methods, starts.QLORA, method)
        if plain is None:
            found.append(method)
            continue
        removed = None
        if method.weight_error_relative is not None and plain.weight_error_relative:
            removed = 1 - method.weight_error_relative / plain.weight_error_relative
        gain = _ratio(plain.kl_divergence, method.kl_divergence)
        found.append(method.model_copy(update={"error_removed": removed, "kl_gain": gain}))
    return found


def verdict(methods: Sequence[ComparedMethod], losses: Losses) -> CompareVerdict:
    """The verdict; ``losses`` has the held-out losses of every window after training, if any."""
    quantized = [
        method
        for method in methods
        if method.rank is not None and starts.of_report(method.init).quantizes
    ]
    parts = [
        _at(bits, [each for each in quantized if each.bits == bits], methods, losses)
        for bits in dict.fromkeys(each.bits for each in quantized)
    ]
    sentences = [part.sentence for part in parts]
    if losses:
        sentences.append("One seed and one learning rate: others may order the starts otherwise.")
    return CompareVerdict(sentence=" ".join(sentences), bits=parts)


def _at(
    bits: int,
    here: Sequence[ComparedMethod],
    methods: Sequence[ComparedMethod],
    losses: Losses,
) -> BitsVerdict:
    """The part for one number of bits."""
    # Ties go to the one that comes first, which is QLoRA.
    best = min(here, key=lambda each: _or_infinite(each.kl_divergence))
    qlora, published = (_find(here, each, best) for each in (starts.QLORA, starts.PUBLISHED))
    assert qlora is not None
    over_plain = None
    if published is not None and best is not published:
        over_plain = _ratio(published.kl_divergence, best.kl_divergence)
    gain = _or_infinite(best.kl_divergence) < (1 - WORTHWHILE_SHARE) * _or_infinite(
        qlora.kl_divergence
    )
    sentence = _distance_sentence(bits, best, qlora, published, gain)
    part = BitsVerdict.model_validate(
        {
            "bits": bits,
            "init": best.init,
            "rank": best.rank,
            "gain": gain,
            "kl_gain": best.kl_gain,
            "kl_gain_over_plain_loftq": over_plain,
            "sentence": sentence,
        }
    )
    return _with_training(part, here, methods, losses) if losses else part


def _distance_sentence(
    bits: int,
    best: ComparedMethod,
    qlora: ComparedMethod,
    published: ComparedMethod | None,
    gain: bool,
) -> str:
    if best.kl_divergence is None:
        return f"At {bits} bits nothing can be said: no KL divergence is a number."
    if best is qlora:
        return (
            f"At {bits} bits no gain here: no start is nearer to the original than QLoRA "
            f"(KL {units.small(best.kl_divergence)})."
        )
    name = name_of(best, with_rank=True)
    if not gain:
        return (
            f"At {bits} bits no gain here: the nearest start, {name}, has KL "
            f"{units.small(best.kl_divergence)}, within {100 * WORTHWHILE_SHARE:.0f} % of QLoRA's "
            f"{_shown(qlora.kl_divergence)}."
        )
    others = [other for other in (qlora, published) if other is not None and other is not best]
    against = " and ".join(_times_nearer(best, other) for other in others)
    return (
        f"At {bits} bits {name} is nearest to the original: KL {units.small(best.kl_divergence)}, "
        f"{against}."
    )


def _with_training(
    part: BitsVerdict,
    here: Sequence[ComparedMethod],
    methods: Sequence[ComparedMethod],
    losses: Losses,
) -> BitsVerdict:
    """The same with where the starts ended."""
    best = min(here, key=lambda each: _or_infinite(each.heldout_loss_after))
    qlora = _find(here, starts.QLORA, best)
    lora = _find(methods, starts.LORA, best, any_bits=True)
    assert qlora is not None
    if qlora.heldout_loss_after is None or best.heldout_loss_after is None:
        text = "Trained, nothing can be said: the training of QLoRA diverged."
        return part.model_copy(update={"sentence": f"{part.sentence} {text}"})
    aside = ""
    if lora is not None and lora.heldout_loss_after is not None:
        aside = f"; 16-bit LoRA ends at {lora.heldout_loss_after:.4f}"
    margin, error, clear = None, None, False
    if best is qlora:
        text = f"Trained, no start ends below QLoRA ({qlora.heldout_loss_after:.4f}){aside}."
    else:
        margin, error = difference(losses[key(qlora)], losses[key(best)])
        clear = error is not None and margin > _ERRORS * error
        text = (
            f"Trained, {name_of(best, with_rank=True)} ends lowest at a held-out loss of "
            f"{best.heldout_loss_after:.4f}, {margin:.4f} below QLoRA"
        )
        text += "" if error is None else f" (standard error {error:.4f})"
        text += f"{aside}." if clear else f", which is within the noise: no gain here{aside}."
    return part.model_copy(
        update={
            "trained_init": best.init,
            "trained_rank": best.rank,
            "trained_margin": margin,
            "trained_margin_error": error,
            "trained_gain": clear,
            "sentence": f"{part.sentence} {text}",
        }
    )


def difference(high: Sequence[float], low: Sequence[float]) -> tuple[float, float | None]:
    """Mean of high − low and its standard error; None where one pair tells nothing of it."""
    each = [one - two for one, two in zip(high, low, strict=True)]
    mean = math.fsum(each) / len(each)
    if len(each) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in each) / (len(each) - 1)
    return mean, math.sqrt(variance / len(each))


def name_of(method: ComparedMethod, *, with_rank: bool = False) -> str:
    name = starts.of_report(method.init).label
    return f"{name} at rank {method.rank}" if with_rank else name


def _find(
    methods: Sequence[ComparedMethod], start: Start, like: ComparedMethod, *, any_bits: bool = False
) -> ComparedMethod | None:
    """The method with this start at the bits and rank of another."""
    return next(
        (
            each
            for each in methods
            if (each.init, each.rank) == (start.name, like.rank)
            and (any_bits or each.bits == like.bits)
        ),
        None,
    )


def _times_nearer(best: ComparedMethod, other: ComparedMethod) -> str:
    ratio = _ratio(other.kl_divergence, best.kl_divergence)
    if ratio is None:
        return f"that of {name_of(other)} {_shown(other.kl_divergence)}"
    times = units.significant(ratio)
    return f"{times} × nearer than {name_of(other)} ({_shown(other.kl_divergence)})"


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _shown(value: float | None) -> str:
    return "is no number" if value is None else units.small(value)
