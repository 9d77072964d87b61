"""Where a weight is worked on: on the GPU, copied there while the one before it is computed.

A layer that does not fit there is computed on the CPU instead, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")


def to_device(W: torch.Tensor, device: str) -> torch.Tensor:
    """``W`` on the device; where there is no room for it, ``W`` as it is.

    Meant for the thread that reads ahead: the copy has a stream of its own, so it does not queue
    behind the products of the layer that is being computed.
    """
    import torch

    if device == "cpu":
        return W
    try:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            moved = W.pin_memory().to(device, non_blocking=True)
        stream.synchronize()
        # Freed memory must not be given away while kernels of the computing stream still read it.
        moved.record_stream(torch.cuda.default_stream(torch.device(device)))
    except torch.OutOfMemoryError:
        return W
    return moved


def with_fallback(
    work: Callable[[torch.Tensor], Result],
    W: torch.Tensor,
    device: str,
    fall_back: Callable[[], None],
) -> Result:
    """``work(W)``, on the CPU if the device has no room; ``fall_back`` is told of that first."""
    import torch

    if device == "cpu":
        return work(W)
    if W.device.type != "cpu":
        try:
            return work(W)
        except torch.OutOfMemoryError:
            pass
    fall_back()
    W = W.cpu()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return work(W)
