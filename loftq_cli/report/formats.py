"""What `quantize` made of a model in words: its numbers, its ranks, its start."""

from __future__ import annotations

import math
from collections import Counter

from loftq_cli.formats import INTEGER_BITS, NF_BITS, WHOLE_ROW
from loftq_cli.report import units
from loftq_cli.schema import AdaptedLayer, PlainLayer, QuantizeResults

# An error, and the fields that have it: of plain quantization, and of backbone and adapter.
ERRORS = {
    "weight error": ("quantized_only_error_relative", "weight_error_relative"),
    "output error": ("quantized_only_output_error_relative", "output_error_relative"),
}


def is_quantized(results: QuantizeResults) -> bool:
    """Whether weights became codes."""
    return results.settings.quant_type != "none"


def in_integers(results: QuantizeResults) -> bool:
    """Whether they lie in a container of integers at their own width."""
    return results.settings.quant_type == "int"


def code_bits(quant_type: str) -> int:
    """What a code takes in the file, by the name of its type: 4 for `nf4`, 0 for no number."""
    return int(quant_type[len(quant_type.rstrip("0123456789")) :] or 0)


def number_of(quant_type: str, bits: int) -> str:
    """One number's format, as a setting or a container has it: `nf4`, or `int4` of `int`."""
    return f"{quant_type}{bits}" if code_bits(quant_type) == 0 else quant_type


def blocks_of(block_size: int) -> str:
    """What shares a scale: `blocks of 64`, or `whole rows`."""
    return "whole rows" if block_size == WHOLE_ROW else f"blocks of {block_size}"


def number_type(results: QuantizeResults) -> str:
    """`NF4`, `NF4/NF2, 2.5 bits on average`, `int8`, or `16 bits (LoRA)`."""
    settings = results.settings
    if not is_quantized(results):
        return f"{units.plain(results.totals.stored_bits or 16)} bits (LoRA)"
    name = settings.quant_type.rstrip("0123456789")
    name = name if name == "int" else name.upper()
    if results.dry_run and settings.target_bits is not None:
        widths = INTEGER_BITS if name == "int" else NF_BITS
        kinds = "/".join(f"{name}{bits}" for bits in sorted(widths, reverse=True))
        return f"{kinds}, {units.plain(settings.target_bits)} bits on average"
    counts: Counter[int] = Counter()  # of weights
    for layer in all_layers(results):
        counts[layer.bits or settings.bits] += math.prod(layer.shape)
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
        f"{units.plain(stored)}: the container has no smaller codes"
    )


def adapter_of(results: QuantizeResults) -> str:
    """`a rank-16 adapter`, or what there is to say of ranks that differ."""
    if results.merged is not None:
        return "its adapter merged"
    settings = results.settings
    low, high = rank_range(results)
    if results.dry_run and settings.rank_budget:
        return f"adapters of as many parameters as rank {settings.rank} has"
    if low == high:
        return f"a rank-{low} adapter"
    padded = f", padded to {max(stored_ranks(results))}" if settings.uniform_rank else ""
    return f"adapter ranks {low} to {high}{padded}"


def rank_range(results: QuantizeResults) -> tuple[int, int]:
    """The smallest and the largest rank of a correction."""
    ranks = [layer.rank or results.settings.rank for layer in results.layers]
    ranks = ranks or [results.settings.rank]
    return min(ranks), max(ranks)


def stored_ranks(results: QuantizeResults) -> set[int]:
    """Those of A and B in the file; more than one, and a loader has to read the rank pattern."""
    ranks = {layer.stored_rank or layer.rank or 0 for layer in results.layers}
    return ranks or {results.settings.rank}


def error_changes(results: QuantizeResults) -> list[tuple[str, float, float]]:
    """(`weight error` or `output error`, of plain quantization, of backbone and adapter)."""
    if not is_quantized(results):
        return []
    found = [(what, *(getattr(results.totals, key) for key in ERRORS[what])) for what in ERRORS]
    return [(what, before, after) for what, before, after in found if None not in (before, after)]


def all_layers(results: QuantizeResults) -> list[AdaptedLayer | PlainLayer]:
    return [*results.layers, *results.without_adapter]
