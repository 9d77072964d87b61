"""Tensors as torch sees them, read from a checkpoint without mapping its files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loftq_cli.checkpoint.safetensors import Header, TensorInfo, read_tensor
from loftq_cli.formats import DTYPE_NAMES

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {**DTYPE_NAMES, "U8": "uint8", "I8": "int8"}


def load_tensor(header: Header, info: TensorInfo) -> torch.Tensor:
    """One tensor of a dtype that we read or write, in memory of its own."""
    import torch

    if 0 in info.shape:
        return torch.empty(info.shape, dtype=torch_dtype(info))
    raw = read_tensor(header, info)
    return torch.frombuffer(raw, dtype=torch_dtype(info)).view(info.shape)


def tensor_memory(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory, little-endian as safetensors wants it, without a copy."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def torch_dtype(info: TensorInfo) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[info.dtype])
    return dtype
