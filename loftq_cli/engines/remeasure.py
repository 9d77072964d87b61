"""Residuals measured again, from files that were written and through the libraries that load them.

Nothing that `quantize` computed is used: Q is what bitsandbytes dequantizes, s·B·A what PEFT holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.checkpoint.tensors import load_tensor
from loftq_cli.engines.plan import PlannedLayer
from loftq_cli.errors import CheckFailed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Residual:
    """‖W − Q − s·B·A‖ / ‖W‖ of one layer, and ‖W − Q‖ / ‖W‖ for the same Q; Frobenius, float64.

    The second is more than plain quantization leaves: this Q was chosen to go with its adapter.
    """

    name: str
    error: float
    error_without_adapter: float


def residuals(
    model: Any, checkpoint: Checkpoint, layers: Iterable[PlannedLayer]
) -> Iterator[Residual]:
    """The residual of each layer of a loaded model against the checkpoint it was made from.

    To be called before the model's first forward pass: on some CPUs bitsandbytes then packs the
    codes in another order.

    Args:
        model: a PEFT model, or a transformers model that has no adapter.

    Raises:
        CheckFailed: a layer is missing, or is not quantized.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = dict(base.named_modules())
    for planned in layers:
        name = planned.layer.module
        module = modules.get(name)
        if module is None:
            raise CheckFailed(f"the reloaded model has no layer {name}")
        with torch.no_grad():
            layer = getattr(module, "base_layer", module)
            Q = _plain(layer, planned) if planned.bits == 16 else _dequantized(name, layer)
            W = load_tensor(*checkpoint.tensors[planned.layer.tensor])
            W = (W.T if planned.layer.transposed else W).to(Q.device).double()
            norm = float(W.norm()) or 1.0
            rest = W.sub_(Q)
            plain = float(rest.norm()) / norm
            if hasattr(module, "lora_A"):
                rest.sub_(_correction(module))
            yield Residual(name, float(rest.norm()) / norm, plain)


def _plain(module: Any, planned: PlannedLayer) -> Tensor:
    """A weight that was not quantized (out, in), float64."""
    weight: Tensor = module.weight.double()
    return weight.T if planned.layer.transposed else weight


def _dequantized(name: str, module: Any) -> Tensor:
    """Q (out, in), float64."""
    from bitsandbytes import functional as bnb

    kind = type(module).__name__
    if kind == "Linear4bit":
        weight = module.weight
        return bnb.dequantize_4bit(weight.data, weight.quant_state).double()
    if kind == "Linear8bitLt":
        return bnb.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).double()
    raise CheckFailed(f"{name} was loaded as {kind}, not as a quantized layer")


def _correction(module: Any) -> Tensor:
    """s·B·A (out, in), float64, of the module's only adapter."""
    (adapter,) = module.active_adapters
    A, B = module.lora_A[adapter].weight.double(), module.lora_B[adapter].weight.double()
    return module.scaling[adapter] * (B @ A)
