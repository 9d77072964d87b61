"""PEFT's ``loftq_init`` with its compute device pointed at the CPU, and otherwise untouched.

PEFT computes on "xpu" or "cuda", written into the function as constants, and has no other way.
Here those two constants are replaced in a copy of its code; every line that runs is PEFT's.
"""

from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor


def loftq_init(
    weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(dequantized weight in ``weight``'s dtype, lora_A (r × in), lora_B (out × r))."""
    from peft.utils import loftq_utils

    function = loftq_utils.loftq_init.__wrapped__  # below @torch.no_grad()
    patched = FunctionType(
        _on_cpu(function.__code__), function.__globals__, argdefs=function.__defaults__
    )
    with torch.no_grad():
        Q, A, B = patched(weight, num_bits, reduced_rank, num_iter)
    return Q, A, B


def relative_residual(W: Tensor, Q: Tensor, A: Tensor, B: Tensor) -> float:
    """‖W − Q − B·A‖ / ‖W‖ in float64."""
    W64 = W.double()
    return float((W64 - Q.double() - B.double() @ A.double()).norm() / W64.norm())


def _on_cpu(code: CodeType) -> CodeType:
    def constant(value: Any) -> Any:
        return "cpu" if isinstance(value, str) and value in ("cuda", "xpu") else value

    patched = tuple(map(constant, code.co_consts))
    if patched == code.co_consts:
        raise RuntimeError("PEFT no longer names its compute device in loftq_init")
    return code.replace(co_consts=patched)
