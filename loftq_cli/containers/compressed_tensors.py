"""compressed-tensors' `pack-quantized` (0.15 and later; dense at 3 bits since 0.18, as vLLM reads
it): for a module X of shape (out, in), blocks of g

    X.weight_packed  int32 (out, in · b / 32), rows of codes (see packing.py)
    X.weight_scale   the source's dtype (out, in / g), of either sign
    X.weight_shape   int64 (2,), out and in

X.weight = q · scale, in the dtype of the scale.

transformers 5.24 that dequantizes such files on loading takes every layer for one of the first
config group; so that one has most of the layers, and mixed widths are for servers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.safetensors import shown
from loftq_cli.checkpoint.tensors import tensor_memory
from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.containers import packing
from loftq_cli.containers.base import Damaged, StoredWeight, Tensors, Weight
from loftq_cli.containers.fused import expert_pattern, expert_stack
from loftq_cli.containers.integers import Integers, by_width
from loftq_cli.formats import DTYPE_NAMES, WHOLE_ROW

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.core.integers import QuantizedIntegers

_FORMAT = "pack-quantized"


class CompressedTensors(Integers):
    name = "compressed-tensors"
    libraries = ("compressed_tensors",)
    instead = "gptq"
    why_experts_stay = None
    takes_experts = True
    restacks = True
    stays_packed = False  # PEFT wants a weight in every layer
    layer_class = "dequantized Linear"
    codes_part = "weight_packed"
    skip_list = "ignore"
    skips_whole_paths = True

    @classmethod
    def holds(cls, module: Any) -> bool:
        return hasattr(module, "quantization_scheme")

    def skipped_stack(self, stack: str) -> str:
        return expert_pattern(stack)

    def scale_bytes(self, shape: tuple[int, int], bits: int) -> int:
        return 2 * shape[0] * self._blocks(shape[1])

    def why_unfit(self, weight: Weight) -> str | None:
        if weight.transposed:
            return "its model's layers are Conv1D, which compressed-tensors does not know"
        return super().why_unfit(weight)

    def planned(self, weight: Weight) -> list[PlannedTensor]:
        rows, columns = weight.shape
        packed, scale, shape = self._tensors_of(weight.name)
        return [
            PlannedTensor(packed, "I32", (rows, packing.words(columns, weight.bits))),
            PlannedTensor(scale, weight.dtype, (rows, self._blocks(columns))),
            PlannedTensor(shape, "I64", (2,)),
        ]

    def quantization_config(
        self, weights: Sequence[Weight], skipped: Sequence[str], dtype: str | None
    ) -> dict[str, Any]:
        groups = by_width(weights)
        return {
            "quant_method": self.name,
            "format": _FORMAT,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{number}": {
                    "targets": ["Linear"] if len(groups) == 1 else _targets(modules),
                    "weights": self._scheme(bits),
                    "input_activations": None,
                    "output_activations": None,
                    "format": _FORMAT,
                }
                for number, (bits, modules) in enumerate(groups.items())
            },
            self.skip_list: list(skipped),
            "kv_cache_scheme": None,
        }

    def tensors(self, name: str, quantized: QuantizedIntegers) -> Iterator[tuple[str, memoryview]]:
        import torch

        packed, scale, shape = self._tensors_of(name)
        codes, bits = quantized.codes, quantized.format.bits
        for rows in packing.chunks(*codes.shape):
            yield packed, tensor_memory(packing.pack(codes[rows], bits))
        yield scale, tensor_memory(quantized.scales.to(quantized.dtype))
        yield shape, tensor_memory(torch.tensor(codes.shape))

    def read(self, tensors: Tensors, weight: Weight, device: str) -> StoredWeight:
        _, scale, shape = self._tensors_of(weight.name)
        if scale in tensors and tensors[scale][1].dtype in DTYPE_NAMES:
            weight = replace(weight, dtype=tensors[scale][1].dtype)
        stored = self._read(tensors, weight, device, self.planned(weight))
        if (told := stored.parts[shape].tolist()) != [*weight.shape]:
            raise Damaged(f"{shown(shape)} is {told}, not {[*weight.shape]}")
        return stored

    def runtime(self, stored: StoredWeight) -> Tensor:
        """As `compressed_tensors` 0.20 does it: each number by its word, the product in the dtype
        of the scales."""
        import torch

        packed, scale, _ = (stored.parts[name] for name in self._tensors_of(stored.weight.name))
        bits, blocks = stored.weight.bits, scale.shape[1]
        Q = torch.empty(stored.weight.shape, dtype=scale.dtype, device=scale.device)
        for rows in packing.chunks(*Q.shape):
            numbers = packing.numbers_of_words(packed[rows], bits)
            q = (numbers - (1 << (bits - 1))).to(scale.dtype).view(len(numbers), blocks, -1)
            Q[rows] = (q * scale[rows, :, None]).view(len(numbers), -1)
        return Q

    def held(self, layer: Any) -> Tensor:
        if not hasattr(layer, "weight_packed"):
            Q: Tensor = layer.weight.detach()
            return Q
        from compressed_tensors.compressors import BaseCompressor

        scheme = layer.quantization_scheme
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        Q = compressor.decompress(dict(layer.named_parameters()), scheme)["weight"]
        return Q

    def _codes_and_scales(self, stored: StoredWeight) -> tuple[Tensor, Tensor]:
        packed, scale, _ = (stored.parts[name] for name in self._tensors_of(stored.weight.name))
        return packing.unpack(packed, stored.weight.bits), scale.float()

    def _tensors_of(self, weight: str) -> list[str]:
        return self._names(weight, "weight_packed", "weight_scale", "weight_shape")

    def _scheme(self, bits: int) -> dict[str, Any]:
        blocks = {"strategy": "group", "group_size": self.block_size}
        return {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            **({"strategy": "channel"} if self.block_size == WHOLE_ROW else blocks),
            "dynamic": False,
            "actorder": None,
        }


def _targets(modules: Sequence[str]) -> list[str]:
    """The modules, all experts of a block as one pattern: their width is the same."""
    named = {
        module: module if (stack := expert_stack(module)) is None else expert_pattern(stack)
        for module in modules
    }
    return list(dict.fromkeys(named.values()))


CONTAINER = CompressedTensors
