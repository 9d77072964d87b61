"""bitsandbytes' 4 bits: for a module X of shape (out, in) with n = out·in elements
(bitsandbytes.functional.QuantState.as_dict; transformers' Bnb4bitDeserialize reads it)

    X.weight                               uint8 (ceil(n/2), 1), first value in the high nibble;
                                           or the same bytes as another dtype (bytes/size, 1)
    X.weight.absmax                        float32 (blocks,); uint8 with double quantization
    X.weight.quant_map                     float32 (16,), the code's levels
    X.weight.quant_state.bitsandbytes__nf4 uint8, JSON: quant_type, blocksize, dtype, shape
    X.weight.nested_absmax, .nested_quant_map    only with double quantization

The dtype of the codes says nothing about the weights: it is there for FSDP, which shards tensors of
one floating dtype only, and is that of the rest then (`bnb_4bit_quant_storage`). Codes of 2 and 3
bits are stored as fewer of the 16. All sizes are known before any weight is read,
so a file's header can be written first. The one value that is not, the mean absmax of double
quantization, gets a fixed width in the JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from loftq_cli.checkpoint.safetensors import shown, strict_json
from loftq_cli.checkpoint.tensors import load_tensor, tensor_memory
from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.containers.base import Container, Damaged, Form, StoredWeight, Tensors, Weight
from loftq_cli.errors import UsageError
from loftq_cli.formats import (
    BLOCK_SIZES,
    DEFAULT_STORAGE,
    DTYPE_BITS,
    DTYPE_NAMES,
    NESTED_BLOCK_SIZE,
    NF_BITS,
    SHORT_NAMES,
    QuantStorage,
    QuantType,
)

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.core.blockwise import BlockwiseFormat, QuantizedBlockwise
    from loftq_cli.core.steps import Quantizer

NESTED_LEVELS = 256
LEVELS = 16
# The longest repr of a double: sign, 17 digits, point, exponent.
_FLOAT_WIDTH = 24
# A quantizer of 4-bit weights may put more into its JSON than is compared below, up to here.
_MAX_STATE_BYTES = 4096

_STORAGES = {name: SHORT_NAMES.get(name, "U8") for name in get_args(QuantStorage)}


class Bitsandbytes4(Container):
    name = "bitsandbytes"
    all_widths = NF_BITS
    number_types = get_args(QuantType)
    options = ("quant_type", "block_size", "double_quant", "quant_storage")
    block_sizes = BLOCK_SIZES
    searches = True
    why_uncalibrated = None
    whole_bytes = None
    # Its merge of experts comes before anything knows that they are packed (5.24).
    why_experts_stay = (
        "an expert: plain transformers 5 loads no quantized ones in bitsandbytes "
        "(--experts quantize writes them for loftq_cli.load and others)"
    )
    takes_experts = True
    layer_class = "Linear4bit"
    skip_list = "llm_int8_skip_modules"

    @classmethod
    def of(cls, form: Form) -> Container:
        if form.block_size not in cls.block_sizes:
            raise UsageError(
                f"no block size {form.block_size}",
                cause="bitsandbytes has kernels for powers of two from 32 to 4096",
                hint="--block-size 64",
            )
        if form.quant_type not in cls.number_types:
            raise UsageError(f"no number type {form.quant_type!r:.40}", hint="--quant-type nf4")
        storage = form.quant_storage or DEFAULT_STORAGE
        if storage not in _STORAGES:
            raise UsageError(
                f"no storage dtype {storage!r:.40}", hint=f"--quant-storage {DEFAULT_STORAGE}"
            )
        return cls(form.quant_type, form.block_size, form.double_quant, storage)

    @classmethod
    def weights_in(cls, names: Iterable[str]) -> set[str]:
        return {name.removesuffix(".absmax") for name in names if name.endswith(".weight.absmax")}

    @property
    def widths(self) -> tuple[int, ...]:
        return self.all_widths if self.quant_type == "nf4" else (4,)

    def code_bits(self, bits: int) -> int:
        return 4

    def scale_bytes(self, shape: tuple[int, int], bits: int) -> int:
        return 4 * self._blocks(shape)

    def why_unfit(self, weight: Weight) -> str | None:
        if weight.shape[1] % self._size == 0:
            return None
        return (
            f"its rows have {weight.shape[1]} weights, and bitsandbytes' kernels want whole blocks "
            "in a row"
        )

    def planned(self, weight: Weight) -> list[PlannedTensor]:
        name, (out_features, in_features) = weight.name, weight.shape
        blocks = self._blocks(weight.shape)
        storage = _STORAGES[self._storage]
        # Rows are whole blocks of 32 or more, so the words of any dtype come out even.
        words = -(-out_features * in_features // 2) * 8 // DTYPE_BITS[storage]
        planned = [
            PlannedTensor(name, storage, (words, 1)),
            PlannedTensor(f"{name}.absmax", "U8" if self.double_quant else "F32", (blocks,)),
            PlannedTensor(f"{name}.quant_map", "F32", (LEVELS,)),
        ]
        if self.double_quant:
            nested_blocks = -(-blocks // NESTED_BLOCK_SIZE)
            planned += [
                PlannedTensor(f"{name}.nested_absmax", "F32", (nested_blocks,)),
                PlannedTensor(f"{name}.nested_quant_map", "F32", (NESTED_LEVELS,)),
            ]
        state = self._state(DTYPE_NAMES[weight.dtype], weight.shape, 0.0)
        return [*planned, PlannedTensor(self._state_name(name), "U8", (len(state),))]

    def quantization_config(
        self, weights: Sequence[Weight], skipped: Sequence[str], dtype: str | None
    ) -> dict[str, Any]:
        compute = {} if dtype is None else {"bnb_4bit_compute_dtype": DTYPE_NAMES[dtype]}
        return {
            "quant_method": self.name,
            "load_in_8bit": False,
            "load_in_4bit": True,
            self.skip_list: skipped,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            **compute,
            "bnb_4bit_quant_storage": self._storage,
        }

    def quantizer(self, bits: int, *, search: bool = True) -> Quantizer:
        from loftq_cli.core.quantizers import Blockwise

        return Blockwise(self._format(bits), search=search)

    def tensors(self, name: str, quantized: QuantizedBlockwise) -> Iterator[tuple[str, memoryview]]:
        yield name, tensor_memory(quantized.packed)
        yield f"{name}.absmax", tensor_memory(quantized.absmax)
        if quantized.nested_absmax is not None:
            yield f"{name}.nested_absmax", tensor_memory(quantized.nested_absmax)
        for end, levels in self._levels().items():
            yield f"{name}.{end}", tensor_memory(levels)
        dtype = str(quantized.dtype).removeprefix("torch.")
        offset = quantized.nested_offset
        state = self._state(dtype, quantized.shape, None if offset is None else float(offset))
        yield self._state_name(name), memoryview(state)

    def read(self, tensors: Tensors, weight: Weight, device: str) -> StoredWeight:
        name = self._state_name(weight.name)
        state = self._read_state(tensors, name, weight.shape)
        *planned, _ = self.planned(replace(weight, dtype=SHORT_NAMES[state["dtype"]]))
        # Of any length: what is in it has been compared.
        length = tensors[name][1].shape
        return self._read(
            tensors, weight, device, [*planned, PlannedTensor(name, "U8", length)], state
        )

    def require_codes(self, stored: StoredWeight) -> None:
        import torch

        from loftq_cli.core.codebooks import codebook

        for end, levels in self._levels().items():
            name = f"{stored.weight.name}.{end}"
            if not torch.equal(stored.parts[name].cpu(), levels):
                raise Damaged(f"{shown(name)} has other levels than the format")
        bits = stored.weight.bits
        if bits == self.code_bits(bits):
            return
        allowed = codebook(self.quant_type, bits).order
        packed = _packed(stored)
        pairs = packed.flatten().int().bincount(minlength=256).view(LEVELS, LEVELS)
        counts = (pairs.sum(dim=1) + pairs.sum(dim=0)).tolist()
        strays = [code for code in range(LEVELS) if counts[code] and code not in allowed]
        if strays:
            weights = sum(counts[code] for code in strays)
            raise Damaged(
                f"code {strays[0]} is none of the {len(allowed)} that {bits} bits have "
                f"({', '.join(map(str, sorted(allowed)))}); so it is with {weights:,} of its "
                "weights"
            )

    def quantized(self, stored: StoredWeight) -> QuantizedBlockwise:
        import torch

        from loftq_cli.core.blockwise import QuantizedBlockwise

        name = stored.weight.name
        return QuantizedBlockwise(
            _packed(stored),
            stored.parts[f"{name}.absmax"],
            stored.parts.get(f"{name}.nested_absmax"),
            stored.description.get("nested_offset"),
            stored.weight.shape,
            self._format(stored.weight.bits),
            getattr(torch, stored.description["dtype"]),
        )

    def runtime(self, stored: StoredWeight) -> Tensor:
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        rest = {name: part for name, part in stored.parts.items() if name != stored.weight.name}
        state = QuantState.from_dict(rest, device=stored.codes.device)
        # Where bitsandbytes has no kernel it compiles one, which takes longer than all else.
        with torch.compiler.set_stance("force_eager"):
            Q: Tensor = dequantize_4bit(stored.codes, state)
        return Q

    def held(self, layer: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        Q: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return Q

    @property
    def _size(self) -> int:
        assert self.block_size is not None
        return self.block_size

    @property
    def _storage(self) -> str:
        return self.quant_storage or DEFAULT_STORAGE

    def _format(self, bits: int) -> BlockwiseFormat:
        from loftq_cli.core.blockwise import BlockwiseFormat

        quant_type: Any = self.quant_type
        return BlockwiseFormat(quant_type, self._size, self.double_quant, bits)

    def _blocks(self, shape: tuple[int, int]) -> int:
        return -(-shape[0] * shape[1] // self._size)

    def _levels(self) -> dict[str, Tensor]:
        """The tables of levels beside the codes, which the kernels have built in."""
        from loftq_cli.core.codebooks import codebook, dynamic_map

        tables = {"quant_map": codebook(self.quant_type).level_tensor()}
        return {**tables, "nested_quant_map": dynamic_map()} if self.double_quant else tables

    def _state_name(self, name: str) -> str:
        return f"{name}.quant_state.bitsandbytes__{self.quant_type}"

    def _facts(self, dtype: str, shape: tuple[int, int]) -> dict[str, Any]:
        facts = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": dtype,
            "shape": list(shape),
        }
        nested = {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
        return {**facts, **nested} if self.double_quant else facts

    def _state(self, dtype: str, shape: tuple[int, int], offset: float | None) -> bytes:
        text = json.dumps(self._facts(dtype, shape))
        if self.double_quant:
            # Spaces after the number are valid JSON and make the length independent of its digits.
            text = f'{text[:-1]}, "nested_offset": {offset!r:<{_FLOAT_WIDTH}}}}'
        return text.encode()

    def _read_state(self, tensors: Tensors, name: str, shape: tuple[int, int]) -> dict[str, Any]:
        """The JSON beside the codes, every value of it compared with the format."""
        if name not in tensors:
            raise Damaged(f"there is no tensor {shown(name)}")
        header, info = tensors[name]
        if info.dtype != "U8" or len(info.shape) != 1 or info.nbytes > _MAX_STATE_BYTES:
            raise Damaged(f"{shown(name)} is {info.dtype} {list(info.shape)}, not JSON")
        try:
            state = strict_json(bytes(load_tensor(header, info).tolist()))
        except (ValueError, RecursionError) as error:
            raise Damaged(f"the JSON in {shown(name)}: {error}") from None
        if not isinstance(state, dict):
            raise Damaged(f"the JSON in {shown(name)} is no object")
        dtype, offset = str(state.get("dtype")), state.get("nested_offset", 0.0)
        expected = self._facts(dtype, shape)
        for key, value in expected.items():
            if key != "dtype" and state.get(key) != value:
                raise Damaged(
                    f"its quant_state says {key} {state.get(key)!r:.80}, the report {value!r}"
                )
        if dtype not in SHORT_NAMES:
            raise Damaged(f"its quant_state says dtype {dtype!r:.80}")
        if not isinstance(offset, float) or not math.isfinite(offset):
            raise Damaged(f"its quant_state says nested_offset {offset!r:.80}")
        extra = set(state) - set(expected) - {"nested_offset"}
        if extra or ("nested_offset" in state) != self.double_quant:
            raise Damaged(f"its quant_state has other keys than the format: {sorted(state)}")
        return state


def _packed(stored: StoredWeight) -> Tensor:
    """The codes as bytes (ceil(n/2), 1), whatever their tensor is called."""
    import torch

    return stored.codes.view(torch.uint8).reshape(-1, 1)


CONTAINER = Bitsandbytes4
