"""What `quantize` made of a model in words: its numbers, its ranks, its start."""

from __future__ import annotations

from loftq_cli.report import units
from loftq_cli.schema import AdaptedLayer, PlainLayer, QuantizeResults

_CONTAINER = "the container has no smaller codes"


def is_quantized(results: QuantizeResults) -> bool:
    """Whether weights became codes."""
    return results.settings.quant_type != "none"


def code_bits(quant_type: str) -> int:
    """What a code takes in the file, by the name of its type: 4 for `nf4`, 0 for no number."""
    return int(quant_type[len(quant_type.rstrip("0123456789")) :] or 0)


def number_type(results: QuantizeResults) -> str:
    """`NF4`, `NF4/NF2, 2.5 bits on average`, `int8`, or `16 bits (LoRA)`."""
    settings = results.settings
    if not is_quantized(results):
        return f"{units.plain(results.totals.stored_bits or 16)} bits (LoRA)"
    name = settings.quant_type.rstrip("0123456789")
    name = name if name == "int" else name.upper()
    if results.dry_run and settings.target_bits is not None:
        return f"{name}4/{name}3/{name}2, {units.plain(settings.target_bits)} bits on average"
    counts: dict[int, int] = {}
    for layer in all_layers(results):
        out_features, in_features = layer.shape
        bits = layer.bits or settings.bits
        counts[bits] = counts.get(bits, 0) + out_features * in_features
    kinds = "/".join(f"{name}{bits}" for bits in sorted(counts, reverse=True))
    if len(counts) < 2:
        return kinds or f"{name}{settings.bits}"
    mean = sum(bits * count for bits, count in counts.items()) / sum(counts.values())
    return f"{kinds}, {units.plain(mean)} bits on average"


def bits_a_weight(results: QuantizeResults) -> str | None:
    """Information against storage, scales included; None where nothing is quantized."""
    stored, information = results.totals.stored_bits, results.totals.information_bits
    if stored is None or information is None or not is_quantized(results):
        return None
    if information == stored:
        return f"{units.plain(stored)} bits a weight, scales included"
    return (
        f"{units.plain(information)} bits of information a weight, stored in "
        f"{units.plain(stored)}: {_CONTAINER}"
    )


def adapter_of(results: QuantizeResults) -> str:
    """`a rank-16 adapter`, or what there is to say of ranks that differ."""
    settings = results.settings
    low, high = rank_range(results)
    if results.dry_run and settings.rank_budget:
        return f"adapters of as many parameters as rank {settings.rank} has"
    if low == high:
        return f"a rank-{low} adapter"
    padded = f", padded to {largest_stored_rank(results)}" if settings.uniform_rank else ""
    return f"adapter ranks {low} to {high}{padded}"


def rank_range(results: QuantizeResults) -> tuple[int, int]:
    """The smallest and the largest rank of a correction."""
    ranks = [layer.rank or results.settings.rank for layer in results.layers]
    ranks = ranks or [results.settings.rank]
    return min(ranks), max(ranks)


def largest_stored_rank(results: QuantizeResults) -> int:
    """Of A and B in the file."""
    ranks = {stored_rank(layer) for layer in results.layers}
    return max(ranks, default=results.settings.rank)


def ranks_differ(results: QuantizeResults) -> bool:
    """Whether a loader has to read the rank pattern."""
    return len({stored_rank(layer) for layer in results.layers}) > 1


def stored_rank(layer: AdaptedLayer) -> int:
    return layer.stored_rank or layer.rank or 0


def error_changes(results: QuantizeResults) -> list[tuple[str, float, float]]:
    """(`weight error` or `output error`, of plain quantization, of backbone and adapter)."""
    totals = results.totals
    found = [
        (
            "weight error",
            totals.quantized_only_error_relative,
            totals.weight_error_relative,
        ),
        (
            "output error",
            totals.quantized_only_output_error_relative,
            totals.output_error_relative,
        ),
    ]
    if not is_quantized(results):
        return []
    return [
        (what, before, after)
        for what, before, after in found
        if before is not None and after is not None
    ]


def all_layers(results: QuantizeResults) -> list[AdaptedLayer | PlainLayer]:
    return [*results.layers, *results.without_adapter]
