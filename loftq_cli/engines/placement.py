"""Where a weight is worked on: on the GPU, copied there while the one before it is computed.

A layer that does not fit there is computed on the CPU instead, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.checkpoint.safetensors import Header, TensorInfo
from loftq_cli.checkpoint.tensors import load_tensor
from loftq_cli.engines.plan import PlannedLayer
from loftq_cli.errors import LoftqError
from loftq_cli.models.layers import LinearLayer
from loftq_cli.record import Progress

if TYPE_CHECKING:
    import torch

    from loftq_cli.models.calibration import Calibration

Result = TypeVar("Result")


def read_weight(checkpoint: Checkpoint, layer: LinearLayer, device: str) -> torch.Tensor:
    """A layer's weight (out × in) on the device; where there is no room for it, on the CPU.

    Fit for a thread that reads ahead: on a GPU the work has a stream of its own, so it does not
    queue behind the products of the layer that is being computed.
    """
    import torch

    def turned(W: torch.Tensor) -> torch.Tensor:
        if layer.place is not None and layer.turned:
            rows = slice(layer.place.part * layer.out_features, None)
            return W.T[rows][: layer.out_features].contiguous()
        return W.T.contiguous() if layer.transposed else W

    W = load_tensor(*located(checkpoint, layer))
    if device == "cpu":
        return turned(W)
    try:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            moved = turned(W.pin_memory().to(device, non_blocking=True))
        stream.synchronize()
        # Freed memory must not be given away while kernels of the computing stream still read it.
        moved.record_stream(torch.cuda.default_stream(torch.device(device)))
    except torch.OutOfMemoryError:
        return turned(W)
    return moved


def located(checkpoint: Checkpoint, layer: LinearLayer) -> tuple[Header, TensorInfo]:
    """Where a layer's weight is read: of a stack of experts no more than lies together."""
    header, info = checkpoint.tensors[layer.source]
    place = layer.place
    if place is None:
        return header, info
    if place.stack.transposed:  # with the other parts of its expert beside it
        shape: tuple[int, ...] = (layer.in_features, place.parts * layer.out_features)
        number, size = place.expert, info.nbytes // (place.count // place.parts)
    else:
        shape = (layer.out_features, layer.in_features)
        number, size = place.index, info.nbytes // place.count
    start = info.start + number * size
    return header, replace(info, name=layer.tensor, shape=shape, start=start, end=start + size)


def with_fallback(
    work: Callable[[torch.Tensor], Result],
    W: torch.Tensor,
    device: str,
    fall_back: Callable[[], None] = lambda: None,
) -> Result:
    """``work(W)``, on the CPU if the device has no room; then ``fall_back`` is called first."""
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


def measure(
    work: Callable[[PlannedLayer, torch.Tensor | None, torch.Tensor], Result],
    layers: Sequence[PlannedLayer],
    checkpoint: Checkpoint,
    *,
    device: str,
    progress: Progress,
    inputs: Calibration | None = None,
) -> dict[str, Result]:
    """What ``work(planned, moments of its inputs, W)`` finds in every layer, by module.

    Raises:
        NonFiniteWeight: a weight holds NaN or infinity.
    """
    places = {module: place for place, module in enumerate(inputs.order if inputs else ())}
    found: dict[str, Result] = {}
    for planned in sorted(layers, key=lambda planned: places.get(planned.layer.module, 0)):
        layer = planned.layer
        progress.start(layer.module)
        known = inputs is not None and inputs.knows(layer.module)
        seen = inputs.moments(layer.module) if inputs is not None and known else None
        try:
            W = read_weight(checkpoint, layer, device)
            found[layer.module] = with_fallback(partial(work, planned, seen), W, device)
        except LoftqError as error:
            raise error.within(layer.tensor) from error
        progress.advance(layer.module)
    return found
