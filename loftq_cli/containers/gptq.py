"""GPTQ's layout, which gptqmodel, vLLM and SGLang read: for a module X of shape (out, in), blocks
of g

    X.qweight  int32 (in · b / 32, out), columns of codes: the rows of packing.py, transposed
    X.qzeros   int32 (in / g, out · b / 32), everywhere the zero point less one, 2^(b−1) − 1
    X.scales   float16 (in / g, out), of either sign
    X.g_idx    int32 (in,), the block of every column

X.weight = (code − (qzeros + 1)) · scales, in the dtype of the model, which no tensor says.

gptqmodel's kernel in plain torch takes the product in float16 and then casts it. To 4 bits that is
the same to the bit, since float16 holds all such products; at 8 bits it rounds twice where the
model is in another dtype.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.safetensors import shown
from loftq_cli.checkpoint.tensors import tensor_memory
from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.containers import packing
from loftq_cli.containers.base import Damaged, StoredWeight, Weight
from loftq_cli.containers.fused import expert_number, fused_name
from loftq_cli.containers.integers import Integers, by_width, dtype_of

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.core.integers import QuantizedIntegers


_EXPERTS = ("gate_proj", "up_proj", "down_proj")


class Gptq(Integers):
    name = "gptq"
    libraries = ("gptqmodel", "optimum")
    # gptqmodel (7.7) has classes of its own that hold each expert as a layer.
    why_experts_stay = (
        "an expert: transformers loads no quantized ones in gptq (--experts quantize writes them "
        "for gptqmodel's own loader)"
    )
    takes_experts = True
    multiples = (packing.GROUP, packing.GROUP)
    layer_class = "quantized layer of gptqmodel"
    codes_part = "qweight"
    skip_list = "modules_to_not_convert"

    @classmethod
    def holds(cls, module: Any) -> bool:
        return any(each.__name__ == "BaseQuantLinear" for each in type(module).__mro__)

    def scale_bytes(self, shape: tuple[int, int], bits: int) -> int:
        rows, columns = shape
        return self._blocks(columns) * (2 * rows + rows * bits // 8) + 4 * columns

    def why_unfit(self, weight: Weight) -> str | None:
        last = weight.module.rpartition(".")[2]
        if expert_number(weight.module) is not None and last not in _EXPERTS:
            return f"gptqmodel looks for {', '.join(_EXPERTS)} in an expert, not for {last}"
        return super().why_unfit(weight)

    def planned(self, weight: Weight) -> list[PlannedTensor]:
        rows, columns = weight.shape
        blocks, bits = self._blocks(columns), weight.bits
        qweight, qzeros, scales, g_idx = self._tensors_of(weight.name)
        return [
            PlannedTensor(qweight, "I32", (packing.words(columns, bits), rows)),
            PlannedTensor(qzeros, "I32", (blocks, packing.words(rows, bits))),
            PlannedTensor(scales, "F16", (blocks, rows)),
            PlannedTensor(g_idx, "I32", (columns,)),
        ]

    def quantization_config(
        self, weights: Sequence[Weight], skipped: Sequence[str], dtype: str | None
    ) -> dict[str, Any]:
        groups = by_width(weights)
        modules = sorted(weight.module for weight in weights)
        return {
            "quant_method": self.name,
            "bits": next(iter(groups), None),
            "group_size": self.block_size,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": self.name,
            "format": self.name,
            "pack_dtype": "int32",
            # For transformers, which otherwise takes every linear layer in what it calls blocks.
            "block_name_to_quantize": _common_path(modules),
            "modules_in_block_to_quantize": [modules],
            self.skip_list: list(skipped),
            # For gptqmodel and vLLM: what is no layer, and what has another width than most.
            "dynamic": {
                **{f"-:{_pattern(module)}": {} for module in skipped},
                **{
                    f"+:{_pattern(module)}": {"bits": bits, "group_size": self.block_size}
                    for bits, those in list(groups.items())[1:]
                    for module in those
                },
            },
        }

    def tensors(self, name: str, quantized: QuantizedIntegers) -> Iterator[tuple[str, memoryview]]:
        codes, bits = quantized.codes, quantized.format.bits
        rows, columns = codes.shape
        qweight, qzeros, scales, g_idx = self._tensors_of(name)
        for part in packing.chunks(columns, rows, packing.GROUP):
            yield qweight, tensor_memory(packing.pack(codes[:, part], bits).t())
        yield qzeros, tensor_memory(self._zeros(rows, columns, bits))
        yield scales, tensor_memory(quantized.scales.t().half())
        yield g_idx, tensor_memory(self._blocks_of(columns))

    def require_codes(self, stored: StoredWeight) -> None:
        import torch

        (rows, columns), bits = stored.weight.shape, stored.weight.bits
        _, qzeros, _, g_idx = self._tensors_of(stored.weight.name)
        expected = {qzeros: self._zeros(rows, columns, bits), g_idx: self._blocks_of(columns)}
        for name, values in expected.items():
            if not torch.equal(stored.parts[name].cpu(), values):
                raise Damaged(f"{shown(name)} is that of another grid, or of another order")
        super().require_codes(stored)

    def runtime(self, stored: StoredWeight) -> Tensor:
        """By the line above: each number by its word, whatever zeros and blocks the file has."""
        import torch

        parts = (stored.parts[name] for name in self._tensors_of(stored.weight.name))
        qweight, qzeros, scales, g_idx = parts
        bits, blocks = stored.weight.bits, g_idx.long()
        zeros = packing.numbers_of_words(qzeros, bits).t() + 1
        Q = torch.empty(stored.weight.shape, dtype=dtype_of(stored.weight), device=scales.device)
        for rows in packing.chunks(*Q.shape):
            numbers = packing.numbers_of_words(qweight[:, rows].t(), bits)
            Q[rows] = scales.t()[rows][:, blocks].float() * (numbers - zeros[rows][:, blocks])
        return Q

    def held(self, layer: Any) -> Tensor:
        Q: Tensor = layer.dequantize_weight().t()
        return Q

    def _codes_and_scales(self, stored: StoredWeight) -> tuple[Tensor, Tensor]:
        qweight, _, scales, _ = (
            stored.parts[name] for name in self._tensors_of(stored.weight.name)
        )
        return packing.unpack(qweight.t(), stored.weight.bits), scales.t().float().contiguous()

    def _tensors_of(self, weight: str) -> list[str]:
        return self._names(weight, "qweight", "qzeros", "scales", "g_idx")

    def _zeros(self, rows: int, columns: int, bits: int) -> Tensor:
        """Of every block, packed: 2^(b−1) − 1, which is the number of the code −1."""
        import torch

        minus_one = torch.full((self._blocks(columns), rows), -1, dtype=torch.int8)
        return packing.pack(minus_one, bits)

    def _blocks_of(self, columns: int) -> Tensor:
        import torch

        return torch.arange(columns, dtype=torch.int32) // (columns // self._blocks(columns))


def _pattern(module: str) -> str:
    """A regular expression for the module, and for what a server makes of it and its siblings."""
    names = "|".join(re.escape(each) for each in (module, fused_name(module)) if each)
    return f"^({names})$"


def _common_path(modules: Sequence[str]) -> str:
    """The path that all begin with, in whole parts."""
    paths = [module.split(".")[:-1] for module in modules]
    same = 0
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1 or parts[0].isdecimal():
            break
        same += 1
    return ".".join(paths[0][:same]) if paths else ""


CONTAINER = Gptq
