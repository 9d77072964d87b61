"""What goes between a GPU and this process in the middle of a weight: few numbers, seldom waited
for.

A GPU is given work ahead of time. Who asks it for a number waits until all of that is done, and the
GPU then waits for its next work: so an iteration asks once, for everything.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same on the CPU, in float64. A GPU is waited for once."""
    if tensors[0].device.type == "cpu":
        return [each.double() for each in tensors]
    flat = torch.cat([each.double().view(-1) for each in tensors]).cpu()
    parts = flat.split([each.numel() for each in tensors])
    return [part.view(each.shape) for part, each in zip(parts, tensors, strict=True)]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The same of a tensor on the CPU, in float32 on the device, and nobody waits for it."""
    tensor = tensor.float()
    if device.type == "cpu":
        return tensor
    # Only out of pinned memory a copy goes on by itself.
    return tensor.pin_memory().to(device, non_blocking=True)
