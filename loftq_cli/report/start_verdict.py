"""What a comparison says, in sentences that follow from its figures, also where that is "no gain".

Distances are KL divergences. Trained starts are held against each other at the learning rate that
suits each best, and a difference counts where it is more than twice its standard error, of two
parts: what another text of the kind could have given, from the differences in single windows, and
what other seeds could have given, from the spread of each start's own, pooled over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loftq_cli import starts
from loftq_cli.formats import DEFAULT_CONTAINER
from loftq_cli.report import units
from loftq_cli.report.stored_bits import by_stored_bits, called, least_sentence
from loftq_cli.report.units import listed
from loftq_cli.schema import BitsVerdict, ComparedMethod, CompareVerdict, Training
from loftq_cli.starts import Start

# Nearer by less than this is no gain.
WORTHWHILE_SHARE = 0.02
# Standard errors that a difference in loss has to exceed.
ERRORS = 2.0

Grid = tuple[int, str | None, int | None, str | None]
Key = tuple[str, int | None, Grid]
Losses = Mapping[Key, Sequence[float]]


def key(method: ComparedMethod) -> Key:
    """What tells a method from the others of a comparison."""
    return method.init, method.rank, grid_of(method)


def grid_of(method: ComparedMethod) -> Grid:
    """What its weights are rounded to, and where they lie; and whether experts are."""
    return method.bits, method.container, method.block_size, method.experts


def relative_to_qlora(methods: Sequence[ComparedMethod]) -> list[ComparedMethod]:
    """The methods, with what each gains over QLoRA on the same grid and at the same rank."""
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


def verdict(
    methods: Sequence[ComparedMethod], losses: Losses, training: Training | None = None
) -> CompareVerdict:
    """The verdict; ``losses`` has the held-out losses of every window after training, if any.

    They are means over the seeds, at each method's own learning rate.
    """
    quantized = [
        method
        for method in methods
        if method.rank is not None and starts.of_report(method.init).quantizes
    ]
    parts = []
    grids = dict.fromkeys(map(grid_of, quantized))
    for grid in grids:
        here = [each for each in quantized if grid_of(each) == grid]
        alone = sum(bits == grid[0] for bits, *_ in grids) == 1
        where = f"{grid[0]} bits" if alone else called(here[0].grid, *grid[1:])
        parts.append(_by_distance(here, where))
        if training is not None:
            trained = _by_training(here, methods, Spread.of(methods, losses, training))
            sentence = f"{parts[-1].sentence} {trained['sentence']}"
            parts[-1] = parts[-1].model_copy(update=trained | {"sentence": sentence})
    sentences = [part.sentence for part in parts]
    if training is not None:
        sentences += _reservations(methods, training)
    against_bytes = by_stored_bits(quantized)
    if against_bytes:
        sentences.append(least_sentence(against_bytes))
    return CompareVerdict(sentence=" ".join(sentences), bits=parts, grids=against_bytes)


def _by_distance(here: Sequence[ComparedMethod], where: str) -> BitsVerdict:
    """Where the starts of one grid begin: which is nearest, and by how much."""
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
        sentence = f"{placed(best)} is nearest to the original: KL {shown}, {against}."
    else:
        sentence = (
            f"no gain here: the nearest start, {placed(best)}, has KL {shown}, within "
            f"{100 * WORTHWHILE_SHARE:.0f} % of QLoRA's {_shown(qlora.kl_divergence)}."
        )
    return BitsVerdict(
        bits=best.bits,
        container=best.container or DEFAULT_CONTAINER,
        block_size=best.block_size,
        experts=best.experts,
        init=best.init,
        rank=best.rank,
        gain=gain,
        kl_gain=best.kl_gain,
        kl_gain_over_plain_loftq=(
            _ratio(published.kl_divergence, best.kl_divergence) if published in worse else None
        ),
        sentence=f"At {where} {sentence}",
    )


@dataclass(frozen=True)
class Spread:
    """What a difference between two trained starts is held against."""

    losses: Losses
    seeds: int
    deviation: float | None  # of one start's loss over the seeds; None with a single seed

    @classmethod
    def of(cls, methods: Sequence[ComparedMethod], losses: Losses, training: Training) -> Spread:
        own = [each.heldout_loss_spread for each in methods if each.heldout_loss_spread is not None]
        pooled = math.sqrt(math.fsum(one**2 for one in own) / len(own)) if own else None
        return cls(losses, len(training.seeds), pooled)

    def difference(
        self, high: ComparedMethod, low: ComparedMethod
    ) -> tuple[float, float | None, bool]:
        """Loss of high − low after training, its standard error, and whether it counts."""
        margin, error = difference(self.losses[key(high)], self.losses[key(low)])
        if self.deviation is not None:
            error = math.hypot(error or 0.0, self.deviation * math.sqrt(2 / self.seeds))
        return margin, error, error is not None and margin > ERRORS * error


def _by_training(
    here: Sequence[ComparedMethod], methods: Sequence[ComparedMethod], spread: Spread
) -> dict[str, Any]:
    """Where the same starts ended, as fields of a `BitsVerdict`."""
    ended = [each for each in here if key(each) in spread.losses]
    best = min(ended, key=_after, default=None)
    qlora = None if best is None else _alike(ended, starts.QLORA, best)
    if best is None or qlora is None:
        return {"sentence": "Trained, nothing can be said: the training of QLoRA diverged."}
    margin, error, clear = spread.difference(qlora, best)
    place = f"{placed(best)} ends lowest, at {_rated(best)}"
    against = f"QLoRA ({_rated(qlora)})"
    shown = f"{margin:.4f}" + ("" if error is None else f" ± {error:.4f}")
    if best is qlora:
        text = f"no gain here: no start ends below {against}"
    elif clear:
        text = f"{place}: {shown} below {against}"
    else:
        text = f"no difference to {against}: {place}, {shown} below it"
    ties = [each for each in ended if each is not best and not spread.difference(each, best)[2]]
    if ties and clear:
        text += f"; no difference to {listed(map(placed, ties))}"
    return {
        "trained_init": best.init,
        "trained_rank": best.rank,
        "trained_learning_rate": best.learning_rate,
        "trained_margin": None if best is qlora else margin,
        "trained_margin_error": None if best is qlora else error,
        "trained_gain": clear,
        "trained_ties": [each.init for each in ties],
        "sentence": f"Trained, {text}{_on_the_way(ended)}{_beside_lora(best, methods, spread)}.",
    }


def _on_the_way(ended: Sequence[ComparedMethod]) -> str:
    """Where the starts were before training and at a quarter of it: what few steps come to."""
    parts = []
    for name, when in (("before", "before training"), ("quarter", "at a quarter of the steps")):
        known = [
            (loss, each)
            for each in ended
            if (loss := getattr(each, f"heldout_loss_{name}")) is not None
        ]
        if len(known) > 1:
            loss, lowest = min(known, key=lambda pair: float(pair[0]))
            parts.append(f"{when} {placed(lowest)} was lowest ({loss:.4f})")
    return f"; {', '.join(parts)}" if parts else ""


def _beside_lora(best: ComparedMethod, methods: Sequence[ComparedMethod], spread: Spread) -> str:
    """How 16-bit LoRA of the same rank did, where it was trained."""
    for each in methods:
        if (each.init, each.rank) == (starts.LORA.name, best.rank) and key(each) in spread.losses:
            above, _, is_higher = spread.difference(each, best)
            below, _, is_lower = spread.difference(best, each)
            beside = "no difference to that"
            if is_higher or is_lower:
                beside = f"{above:.4f} above that" if is_higher else f"{below:.4f} below that"
            return f"; 16-bit LoRA ends at {_rated(each)}, {beside}"
    return ""


def _reservations(methods: Sequence[ComparedMethod], training: Training) -> Iterator[str]:
    """What limits what the figures say."""
    if len(training.learning_rates) == 1:
        yield "One learning rate for all: at its own best a start may end elsewhere."
    if len(training.seeds) == 1:
        yield "One seed: what others would give is not known."
    trained = [each for each in methods if each.learning_rate is not None]
    lowest, highest = training.learning_rates[0], training.learning_rates[-1]
    for end, beyond in (
        ("lowest", (lowest / 4, lowest / 2, lowest)),
        ("highest", (highest, highest * 2, highest * 4)),
    ):
        there = [each for each in trained if each.rate_at_end == end]
        if there:
            names = ", ".join(map(_called, there)) if there != trained else "every start"
            rates = ",".join(f"{rate:g}" for rate in beyond)
            yield (
                f"Best at the {end} learning rate that was tried, so that others may be better: "
                f"{names} (--learning-rate {rates})."
            )


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
    """The method with this start at the grid and rank of another."""
    wanted = (start.name, like.rank, grid_of(like))
    return next((each for each in methods if key(each) == wanted), None)


def is_below(low: Sequence[float], high: Sequence[float]) -> bool:
    """Whether the first loss is lower than the second, window by window, beyond the error."""
    margin, error = difference(high, low)
    return margin > ERRORS * (error or 0.0)


def _after(method: ComparedMethod) -> float:
    return _or_infinite(method.heldout_loss_after)


def _rated(method: ComparedMethod) -> str:
    return f"{_after(method):.4f} with learning rate {method.learning_rate:g}"


def _called(method: ComparedMethod) -> str:
    return f"{starts.of_report(method.init).label} ({method.bits} bits, rank {method.rank})"


def placed(method: ComparedMethod) -> str:
    """`loftq at rank 16`."""
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
