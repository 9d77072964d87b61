"""One quantized weight out of the files, in the container that the report names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loftq_cli.checks.written.directory import WRITE_AGAIN, ClaimedLayer, Written
from loftq_cli.containers.base import Damaged, StoredWeight, Weight
from loftq_cli.errors import CheckFailed


def stored_weight(written: Written, layer: ClaimedLayer) -> StoredWeight:
    """The layer's tensors on the device, once they have been seen to fit each other."""
    name = written.weight_of(layer)
    with damage_told(layer):
        # Of which dtype it was, only the container may know.
        weight = Weight(name, layer.name, layer.shape, layer.bits, dtype="")
        return written.claims.container.read(written.checkpoint.tensors, weight, written.device)


@contextmanager
def damage_told(layer: ClaimedLayer) -> Iterator[None]:
    """Says of which layer the tensors are damaged."""
    try:
        yield
    except Damaged as error:
        raise not_as_reported(layer, str(error)) from None


def not_as_reported(layer: ClaimedLayer, cause: str) -> CheckFailed:
    return CheckFailed(
        f"{layer.name} is not stored as the report says", cause=cause, hint=WRITE_AGAIN
    )
