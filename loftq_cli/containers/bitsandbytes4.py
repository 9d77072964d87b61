"""The bitsandbytes container: how quantized weights lie in safetensors files.

4 bits, for a module X of shape (out, in) with n = out·in elements
(bitsandbytes.functional.QuantState.as_dict; transformers' Bnb4bitDeserialize reads it):

    X.weight                               uint8 (ceil(n/2), 1), first value in the high nibble
    X.weight.absmax                        float32 (blocks,); uint8 with double quantization
    X.weight.quant_map                     float32 (16,), the code's levels
    X.weight.quant_state.bitsandbytes__nf4 uint8, JSON: quant_type, blocksize, dtype, shape
    X.weight.nested_absmax, .nested_quant_map    only with double quantization

8 bits (bitsandbytes.nn.Linear8bitLt):

    X.weight  int8 (out, in)      X.SCB  float32 (out,), row absmax      X.weight_format  uint8 ()

All sizes are known before any weight is read, so a file's header can be written first. The one
value that is not, the mean absmax of double quantization, gets a fixed width in the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.formats import DTYPE_NAMES, NESTED_BLOCK_SIZE

if TYPE_CHECKING:
    import torch

    from loftq_cli.core.blockwise import QuantizedBlockwise
    from loftq_cli.core.int8 import QuantizedInt8

NESTED_LEVELS = 256
LEVELS = 16
# The longest repr of a double: sign, 17 digits, point, exponent.
_FLOAT_WIDTH = 24


def plan_4bit(
    weight: str, shape: tuple[int, int], dtype: str, quant_type: str, block_size: int, double: bool
) -> list[PlannedTensor]:
    """Names, dtypes and shapes of what one 4-bit weight becomes.

    Args:
        weight: the tensor's name in the source, ending in `.weight`.
        shape: (out, in).
        dtype: the source's dtype as safetensors spells it; Q is dequantized to it.
    """
    elements = shape[0] * shape[1]
    blocks = -(-elements // block_size)
    planned = [
        PlannedTensor(weight, "U8", (-(-elements // 2), 1)),
        PlannedTensor(f"{weight}.absmax", "U8" if double else "F32", (blocks,)),
        PlannedTensor(f"{weight}.quant_map", "F32", (LEVELS,)),
    ]
    if double:
        nested_blocks = -(-blocks // NESTED_BLOCK_SIZE)
        planned += [
            PlannedTensor(f"{weight}.nested_absmax", "F32", (nested_blocks,)),
            PlannedTensor(f"{weight}.nested_quant_map", "F32", (NESTED_LEVELS,)),
        ]
    state = _quant_state(quant_type, block_size, DTYPE_NAMES[dtype], shape, 0.0 if double else None)
    name = f"{weight}.quant_state.bitsandbytes__{quant_type}"
    return [*planned, PlannedTensor(name, "U8", (len(state),))]


def plan_8bit(weight: str, shape: tuple[int, int]) -> list[PlannedTensor]:
    """The same for one int8 weight."""
    module = weight.removesuffix(".weight")
    return [
        PlannedTensor(weight, "I8", shape),
        PlannedTensor(f"{module}.SCB", "F32", (shape[0],)),
        PlannedTensor(f"{module}.weight_format", "U8", ()),
    ]


def tensors(
    weight: str, quantized: QuantizedBlockwise | QuantizedInt8
) -> Iterator[tuple[str, memoryview]]:
    """Names and bytes of what a weight became, in the order that its plan announced."""
    from loftq_cli.core.int8 import QuantizedInt8

    if isinstance(quantized, QuantizedInt8):
        return _tensors_8bit(weight, quantized)
    return _tensors_4bit(weight, quantized)


def _tensors_4bit(weight: str, quantized: QuantizedBlockwise) -> Iterator[tuple[str, memoryview]]:
    from loftq_cli.core.codebooks import codebook, dynamic_map

    fmt = quantized.format
    yield weight, tensor_memory(quantized.packed)
    yield f"{weight}.absmax", tensor_memory(quantized.absmax)
    yield f"{weight}.quant_map", tensor_memory(codebook(fmt.quant_type).level_tensor())
    if quantized.nested_absmax is not None:
        yield f"{weight}.nested_absmax", tensor_memory(quantized.nested_absmax)
        yield f"{weight}.nested_quant_map", tensor_memory(dynamic_map())
    dtype = str(quantized.dtype).removeprefix("torch.")
    state = _quant_state(
        fmt.quant_type, fmt.block_size, dtype, quantized.shape, quantized.nested_offset
    )
    yield f"{weight}.quant_state.bitsandbytes__{fmt.quant_type}", memoryview(state)


def _tensors_8bit(weight: str, quantized: QuantizedInt8) -> Iterator[tuple[str, memoryview]]:
    module = weight.removesuffix(".weight")
    yield weight, tensor_memory(quantized.codes)
    yield f"{module}.SCB", tensor_memory(quantized.scb)
    yield f"{module}.weight_format", memoryview(b"\x00")  # 0 means row-major


def tensor_memory(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory, little-endian as safetensors wants it, without a copy."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _quant_state(
    quant_type: str, block_size: int, dtype: str, shape: tuple[int, int], offset: float | None
) -> bytes:
    state: dict[str, object] = {
        "quant_type": quant_type,
        "blocksize": block_size,
        "dtype": dtype,
        "shape": list(shape),
    }
    if offset is None:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
    # Spaces after the number are valid JSON and make the length independent of its digits.
    return f'{json.dumps(state)[:-1]}, "nested_offset": {offset!r:<{_FLOAT_WIDTH}}}}'.encode()
