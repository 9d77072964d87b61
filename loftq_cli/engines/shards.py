"""Which tensors share an output file: whole decoder blocks, as many as fit.

An output file is what a killed run loses at most and what an engine hands out, so it is small: one
decoder block, or several where they are small. The embeddings and all else that stands outside the
blocks is a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol, TypeVar

from loftq_cli.models.layers import LeftTensor, block_of

# Several blocks share a file up to this; a model of less is one file.
SHARD_BYTES = 16 << 20


class Named(Protocol):
    """A tensor to copy, or a layer to quantize: what both have."""

    @property
    def tensor(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)


def shards(entries: Sequence[Entry], nbytes: Callable[[Entry], int]) -> list[list[Entry]]:
    """The entries of each output file, in the order in which they are to be made.

    Blocks come in the order of their first layers, so that a calibration goes through the model
    once; what is outside of them and only copied comes first.
    """
    if sum(map(nbytes, entries)) <= SHARD_BYTES:
        return [list(entries)]
    found: list[list[Entry]] = []
    room = -1
    for key, unit in _units(entries):
        size = sum(map(nbytes, unit))
        outside = isinstance(key, int)
        if outside or size > room:
            found.append([])
            room = SHARD_BYTES
        found[-1] += unit
        room = -1 if outside else room - size  # no block joins what is outside
    return found


def _units(entries: Iterable[Entry]) -> list[tuple[Hashable, list[Entry]]]:
    """What is kept together: each block, and what is outside, between which blocks it is computed.

    The key of what is outside is the number of blocks whose layers came before it.
    """
    units: dict[Hashable, list[Entry]] = {0: []}
    begun: dict[Hashable, int] = {0: -1}  # by the place of a unit's first layer
    blocks: set[str] = set()
    for place, entry in enumerate(entries):
        is_layer = not isinstance(entry, LeftTensor)
        block = block_of(entry.tensor)
        if is_layer and block is not None:
            blocks.add(block)
        key: Hashable = block if block is not None else len(blocks) * is_layer
        units.setdefault(key, []).append(entry)
        if is_layer:
            begun.setdefault(key, place)
    ordered = sorted(units.items(), key=lambda unit: begun.get(unit[0], -1))
    return [(key, unit) for key, unit in ordered if unit]
