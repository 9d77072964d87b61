"""bitsandbytes' 8 bits (`bitsandbytes.nn.Linear8bitLt`): for a module X of shape (out, in)

X.weight  int8 (out, in)      X.SCB  float32 (out,), row absmax      X.weight_format  uint8 ()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.tensors import tensor_memory
from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.containers.base import Container, StoredWeight, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.core.int8 import QuantizedInt8
    from loftq_cli.core.steps import Quantizer


class Bitsandbytes8(Container):
    name = "bitsandbytes"
    all_widths = (8,)
    number_types = ("int8",)
    why_uncalibrated = "8-bit layers round the activations too, which no start corrects"
    warning = (
        "8 bits: bitsandbytes' int8 layers also round the activations, which no adapter "
        "corrects; expect little gain from LoftQ here"
    )
    layer_class = "Linear8bitLt"
    skip_list = "llm_int8_skip_modules"

    @classmethod
    def weights_in(cls, names: Iterable[str]) -> set[str]:
        return {f"{name.removesuffix('.SCB')}.weight" for name in names if name.endswith(".SCB")}

    def scale_bytes(self, shape: tuple[int, int], bits: int) -> int:
        return 4 * shape[0]

    def planned(self, weight: Weight) -> list[PlannedTensor]:
        module = weight.name.removesuffix(".weight")
        return [
            PlannedTensor(weight.name, "I8", weight.shape),
            PlannedTensor(f"{module}.SCB", "F32", (weight.shape[0],)),
            PlannedTensor(f"{module}.weight_format", "U8", ()),
        ]

    def quantization_config(
        self, weights: Sequence[Weight], skipped: Sequence[str], dtype: str | None
    ) -> dict[str, Any]:
        return {
            "quant_method": self.name,
            "load_in_8bit": True,
            "load_in_4bit": False,
            self.skip_list: skipped,
            # No outlier columns in 16 bits, whose detection would cost every forward.
            "llm_int8_threshold": 0.0,
            "llm_int8_has_fp16_weight": False,
        }

    def quantizer(self, bits: int, *, search: bool = True) -> Quantizer:
        from loftq_cli.core.quantizers import Int8

        return Int8()

    def tensors(self, name: str, quantized: QuantizedInt8) -> Iterator[tuple[str, memoryview]]:
        module = name.removesuffix(".weight")
        yield name, tensor_memory(quantized.codes)
        yield f"{module}.SCB", tensor_memory(quantized.scb)
        yield f"{module}.weight_format", memoryview(b"\x00")  # 0 means row-major

    def quantized(self, stored: StoredWeight) -> QuantizedInt8:
        from loftq_cli.core.int8 import QuantizedInt8

        return QuantizedInt8(stored.codes, self._row_scales(stored))

    def runtime(self, stored: StoredWeight) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        Q: Tensor = int8_vectorwise_dequant(stored.codes, self._row_scales(stored))
        return Q

    def held(self, layer: Any) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        Q: Tensor = int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        return Q

    def _row_scales(self, stored: StoredWeight) -> Tensor:
        return stored.parts[f"{stored.weight.name.removesuffix('.weight')}.SCB"]


CONTAINER = Bitsandbytes8
