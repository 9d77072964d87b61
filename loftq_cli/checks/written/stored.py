"""One quantized weight out of the files: checked in its parts, then handed to bitsandbytes.

bitsandbytes' kernels trust the shapes that they are told and read past the end of a buffer that
is too small for them. So nothing reaches them whose parts do not fit each other.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.safetensors import shown, strict_json
from loftq_cli.checkpoint.tensors import load_tensor
from loftq_cli.checks.written.directory import WRITE_AGAIN, ClaimedLayer, Written
from loftq_cli.containers import bitsandbytes4 as container
from loftq_cli.errors import CheckFailed
from loftq_cli.formats import DTYPE_NAMES, NESTED_BLOCK_SIZE

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {name: short for short, name in DTYPE_NAMES.items()}
# What a quantizer of 4-bit weights may put into its JSON beyond what is compared below.
_MAX_STATE_BYTES = 4096


class StoredWeight:
    """The tensors of one quantized layer, on the device."""

    def __init__(self, written: Written, layer: ClaimedLayer) -> None:
        self.layer = layer
        self.claims = written.claims
        self.weight = written.weight_of(layer)
        self._tensors = written.checkpoint.tensors
        self.state: dict[str, Any] = {}
        planned = self._planned_8bit() if self.claims.bits == 8 else self._planned_4bit()
        for name, expected in planned.items():
            self._require(name, expected)
        self.parts = {
            name: load_tensor(*self._tensors[name]).to(written.device) for name in planned
        }

    def runtime(self) -> Tensor:
        """Q (out × in) as bitsandbytes dequantizes it, in the dtype that it computes with."""
        import torch
        from bitsandbytes import functional as bnb

        codes = self.parts[self.weight]
        if self.claims.bits == 8:
            return bnb.int8_vectorwise_dequant(codes, self._row_scales())
        rest = {name: part for name, part in self.parts.items() if name != self.weight}
        state = bnb.QuantState.from_dict(rest, device=codes.device)
        # Where bitsandbytes has no kernel it compiles one, which takes longer than all else.
        with torch.compiler.set_stance("force_eager"):
            return bnb.dequantize_4bit(codes, state)

    def reference(self) -> Tensor:
        """The same by the readable reference."""
        import torch

        from loftq_cli.core.blockwise import (
            BlockwiseFormat,
            QuantizedBlockwise,
            dequantize_blockwise,
        )
        from loftq_cli.core.int8 import QuantizedInt8, dequantize_int8

        codes, claims = self.parts[self.weight], self.claims
        if claims.bits == 8:
            return dequantize_int8(QuantizedInt8(codes, self._row_scales()))
        assert claims.block_size is not None
        quant_type: Any = claims.quant_type
        return dequantize_blockwise(
            QuantizedBlockwise(
                codes,
                self.parts[f"{self.weight}.absmax"],
                self.parts.get(f"{self.weight}.nested_absmax"),
                self.state.get("nested_offset"),
                self.layer.shape,
                BlockwiseFormat(quant_type, claims.block_size, claims.double_quant),
                getattr(torch, self.state["dtype"]),
            )
        )

    def require_levels(self) -> None:
        """The tables of levels beside the codes are those that the kernels use."""
        import torch

        from loftq_cli.core.codebooks import codebook, dynamic_map

        if self.claims.bits == 8:
            return
        tables = {"quant_map": codebook(self.claims.quant_type).level_tensor()}
        if self.claims.double_quant:
            tables["nested_quant_map"] = dynamic_map()
        for end, table in tables.items():
            name = f"{self.weight}.{end}"
            if not torch.equal(self.parts[name].cpu(), table):
                raise self._damaged(f"{shown(name)} has other levels than the format")

    def require_codes(self) -> None:
        """A layer of fewer bits uses no other codes than those of its codebook."""
        from loftq_cli.core.codebooks import codebook

        if self.layer.bits >= 4:
            return
        allowed = codebook(self.claims.quant_type, self.layer.bits).order
        pairs = self.parts[self.weight].flatten().int().bincount(minlength=256).view(16, 16)
        counts = (pairs.sum(dim=1) + pairs.sum(dim=0)).tolist()
        strays = [code for code in range(16) if counts[code] and code not in allowed]
        if strays:
            weights = sum(counts[code] for code in strays)
            raise self._damaged(
                f"code {strays[0]} is none of the {len(allowed)} that {self.layer.bits} bits have "
                f"({', '.join(map(str, sorted(allowed)))}); so it is with {weights:,} of its "
                "weights"
            )

    def _row_scales(self) -> Tensor:
        return self.parts[f"{self.weight.removesuffix('.weight')}.SCB"]

    def _planned_8bit(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        planned = container.plan_8bit(self.weight, self.layer.shape)
        return {each.name: (each.dtype, each.shape) for each in planned}

    def _planned_4bit(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        claims = self.claims
        name = f"{self.weight}.quant_state.bitsandbytes__{claims.quant_type}"
        self.state = self._quant_state(name)
        assert claims.block_size is not None
        planned = container.plan_4bit(
            self.weight,
            self.layer.shape,
            _DTYPES[self.state["dtype"]],
            claims.quant_type,
            claims.block_size,
            claims.double_quant,
        )
        found = {each.name: (each.dtype, each.shape) for each in planned}
        # Of any length: what is in it has been compared.
        return {**found, name: ("U8", self._tensors[name][1].shape)}

    def _quant_state(self, name: str) -> dict[str, Any]:
        """The JSON beside the codes, every value of it compared with the report."""
        claims = self.claims
        if name not in self._tensors:
            raise self._damaged(f"there is no tensor {shown(name)}")
        header, info = self._tensors[name]
        if info.dtype != "U8" or len(info.shape) != 1 or info.nbytes > _MAX_STATE_BYTES:
            raise self._damaged(f"{shown(name)} is {info.dtype} {list(info.shape)}, not JSON")
        try:
            state = strict_json(bytes(load_tensor(header, info).tolist()))
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"the JSON in {shown(name)}: {error}") from None
        expected: dict[str, Any] = {
            "quant_type": claims.quant_type,
            "blocksize": claims.block_size,
            "shape": list(self.layer.shape),
        }
        if claims.double_quant:
            expected["nested_blocksize"] = NESTED_BLOCK_SIZE
            expected["nested_dtype"] = "float32"
        if not isinstance(state, dict):
            raise self._damaged(f"the JSON in {shown(name)} is no object")
        for key, value in expected.items():
            if state.get(key) != value:
                raise self._damaged(
                    f"its quant_state says {key} {state.get(key)!r:.80}, the report {value!r}"
                )
        if state.get("dtype") not in _DTYPES:
            raise self._damaged(f"its quant_state says dtype {state.get('dtype')!r:.80}")
        offset = state.get("nested_offset", 0.0)
        if not isinstance(offset, float) or not math.isfinite(offset):
            raise self._damaged(f"its quant_state says nested_offset {offset!r:.80}")
        extra = set(state) - set(expected) - {"dtype", "nested_offset"}
        if extra or ("nested_offset" in state) != claims.double_quant:
            raise self._damaged(f"its quant_state has other keys than the format: {sorted(state)}")
        return state

    def _require(self, name: str, expected: tuple[str, tuple[int, ...]]) -> None:
        if name not in self._tensors:
            raise self._damaged(f"there is no tensor {shown(name)}")
        info = self._tensors[name][1]
        if (info.dtype, info.shape) != expected:
            raise self._damaged(
                f"{shown(name)} is {info.dtype} {list(info.shape)}, and a layer of shape "
                f"{list(self.layer.shape)} needs {expected[0]} {list(expected[1])}"
            )

    def _damaged(self, cause: str) -> CheckFailed:
        return CheckFailed(
            f"{self.layer.name} is not stored as the report says", cause=cause, hint=WRITE_AGAIN
        )
