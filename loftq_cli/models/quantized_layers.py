"""Linear layers that compute what the runtime will, in a model that holds the original weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from loftq_cli.models.layerwise import given
from loftq_cli.models.routed import ExpertPlace, with_products

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.models.routed import Product


@dataclass(frozen=True)
class QuantizedLayer:
    """Q·x + s·B·(A·x), beside the bias: codes as the runtime dequantizes them, and the adapter.

    ``adapter`` is A (rank × in) and B (out × rank) as they lie in the file, None without one.
    """

    Q: Tensor  # (out × in)
    adapter: tuple[Tensor, Tensor] | None
    scaling: float


def quantized_forwards(
    model: Any, layers: Mapping[str, QuantizedLayer], device: str
) -> dict[str, Callable[..., Any]]:
    """For `layerwise.replaced`: these modules compute what they become, on ``device``."""
    return {name: _forward(model.get_submodule(name), layers[name], device) for name in layers}


def quantized_experts(experts: Any, product: Product) -> Callable[..., Any]:
    """For `layerwise.replaced`: a module of experts whose products are these."""

    def forward(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with with_products(experts, product):
            return own(*args, **kwargs)

    return forward


def quantized_product(
    places: Mapping[str, ExpertPlace], quantized: Callable[[str], QuantizedLayer], device: str
) -> Product:
    """Products with the codes that matrices of experts have become, on ``device``.

    ``places`` are those of all matrices in one module, and ``quantized`` is asked for those that
    are multiplied with.
    """
    import torch
    from torch.nn.functional import linear

    parts: dict[tuple[str, int], list[str]] = {}
    for name, place in sorted(places.items(), key=lambda each: each[1].part):
        parts.setdefault((place.parameter, place.expert), []).append(name)

    def product(parameter: str, expert: int, x: Tensor, weight: Tensor) -> Tensor:
        Q = torch.cat([quantized(name).Q for name in parts[parameter, expert]])
        return linear(x, Q.to(device, weight.dtype))

    return product


def _forward(module: Any, layer: QuantizedLayer, device: str) -> Callable[..., Any]:
    """As bitsandbytes and PEFT do it: the adapter in float32, its product cast before it is added.

    The bias is what the layer gives for zeros, wherever accelerate keeps its parameters.
    """
    import torch
    from torch.nn.functional import linear

    dtype = module.weight.dtype
    Q = layer.Q.to(device, dtype)
    with torch.no_grad():
        bias = module(torch.zeros(1, Q.shape[1], dtype=dtype, device=device))[0]
    if layer.adapter is None:
        return partial(_computed, Q, bias, None)
    A, B = (factor.to(device, torch.float32) for factor in layer.adapter)

    def correct(x: Tensor) -> Tensor:
        return linear(linear(x.float(), A), B) * layer.scaling

    return partial(_computed, Q, bias, correct)


def _computed(
    Q: Tensor,
    bias: Tensor,
    correct: Callable[[Tensor], Tensor] | None,
    _own: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    from torch.nn.functional import linear

    x = given(args, kwargs)
    y = linear(x.to(Q.dtype), Q, bias)
    return y if correct is None else y + correct(x).to(y.dtype)
