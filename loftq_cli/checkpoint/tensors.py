"""Tensors as torch sees them, read from a checkpoint without mapping its files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.safetensors import Header, TensorInfo, read_pieces, shown
from loftq_cli.errors import InvalidSetting
from loftq_cli.formats import DTYPE_NAMES

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {
    **DTYPE_NAMES, "F64": "float64", "U8": "uint8", "I8": "int8", "I32": "int32", "I64": "int64"
}  # fmt: skip


def load_tensor(header: Header, info: TensorInfo) -> torch.Tensor:
    """One tensor of a dtype that we read or write, in memory of its own.

    Raises:
        InvalidSetting: a value is beyond the range of the dtype that it is read as.
    """
    import torch

    tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
    memory, filled = tensor_memory(tensor), 0
    for piece in load_pieces(header, info):
        memory[filled : filled + len(piece)] = piece
        filled += len(piece)
    return tensor


def load_pieces(header: Header, info: TensorInfo) -> Iterator[memoryview]:
    """The bytes of a tensor, a few megabytes at a time; each is good until the next is asked for.

    Raises:
        InvalidSetting: as for `load_tensor`.
    """
    if info.stored is None:
        yield from read_pieces(header, info)
    else:
        yield from map(tensor_memory, _cast(header, info))


def _cast(header: Header, info: TensorInfo) -> Iterator[torch.Tensor]:
    import torch

    assert info.stored is not None
    for raw in read_pieces(header, info):
        yield rounded(torch.frombuffer(raw, dtype=torch_dtype(info.stored)), info.dtype, info.name)


def rounded(tensor: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """The tensor in another dtype, by safetensors' name of that.

    Raises:
        InvalidSetting: a value is beyond its range.
    """
    import torch

    cast = tensor.to(torch_dtype(dtype))
    if not torch.equal(cast.isfinite(), tensor.isfinite()):
        largest = tensor[tensor.isfinite()].abs().max()
        kind, most = DTYPE_NAMES[dtype], torch.finfo(cast.dtype).max
        raise InvalidSetting(
            f"{shown(name)} does not fit into {kind}",
            cause=f"it has values as large as {largest:.3g}, and {kind} ends at {most:.5g}",
            hint="--dtype bfloat16 or --dtype float32",
        )
    return cast


def tensor_memory(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory, little-endian as safetensors wants it, without a copy."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def torch_dtype(name: str) -> torch.dtype:
    """By safetensors' name of it."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return dtype
