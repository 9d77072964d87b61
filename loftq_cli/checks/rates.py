"""How fast this device multiplies, copies and decomposes, and how exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from loftq_cli.checks.battery import Finding
from loftq_cli.checks.specimens import short
from loftq_cli.errors import CheckFailed

if TYPE_CHECKING:
    from torch import Tensor

# Long enough to be past the first microseconds' noise, short enough for a battery.
_SECONDS = 0.3
_REPEATS = 50
# Must not fit into any cache.
_COPY_BYTES = 256 << 20
_TRIAL_SIDE = 256
_SVD_SIDE = 1024
_SVD_RANK = 64


def half_precision(device: str) -> Finding:
    """Products in float32, bfloat16 and float16, each against float64 on the same numbers."""
    import torch

    generator = torch.Generator().manual_seed(0)
    A = torch.randn(192, 512, generator=generator)
    B = torch.randn(512, 256, generator=generator)
    figures: dict[str, Any] = {}
    for dtype in _dtypes():
        name = short(dtype)
        a, b = A.to(device, dtype), B.to(device, dtype)
        exact = a.double() @ b.double()
        error = float(((a @ b).double() - exact).norm() / exact.norm())
        # The result is rounded to the dtype; the sum is to be carried in float32, or nearly so.
        if not error < max(2 * torch.finfo(dtype).eps, 1e-5):
            raise CheckFailed(
                f"matrix products in {name} are wrong",
                cause=f"a 192×512 by 512×256 product is {error:.2g} (relative) from that in "
                "float64",
                hint=f"avoid --dtype {name} on this device",
            )
        figures[f"error_relative_{name}"] = error
    figures["bfloat16_native"] = _native_bfloat16(device)
    native = "in hardware" if figures["bfloat16_native"] else "by way of float32"
    return Finding(
        "relative error "
        + ", ".join(f"{figures[f'error_relative_{short(d)}']:.1e} in {short(d)}" for d in _dtypes())
        + f"; bfloat16 {native}",
        figures,
    )


def matrix_products(device: str) -> Finding:
    """Floating-point operations a second of a square product, for each dtype."""
    side = 4096 if device.startswith("cuda") else 1024
    figures: dict[str, Any] = {
        f"flops_per_second_{short(dtype)}": _product_rate(device, dtype, side)
        for dtype in _dtypes()
    }
    text = ", ".join(
        f"{figures[f'flops_per_second_{short(dtype)}'] / 1e9:,.3g} GFLOP/s in {short(dtype)}"
        for dtype in _dtypes()
    )
    if device == "cpu":
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            alone = _product_rate(device, torch.float32, side)
        finally:
            torch.set_num_threads(threads)
        figures |= {"threads": threads, "flops_per_second_float32_one_thread": alone}
        if threads > 1:
            text += f" with {threads} threads; {alone / 1e9:,.3g} in float32 with one"
    return Finding(text, figures)


def _product_rate(device: str, dtype: Any, side: int) -> float:
    """Operations a second of a ``side`` × ``side`` product; of a small one where that is slow."""
    import torch

    small, large = (torch.ones(n, n, device=device, dtype=dtype) for n in (_TRIAL_SIDE, side))
    seconds = fastest(lambda: small @ small, device, seconds=0.0)
    if seconds * (side / _TRIAL_SIDE) ** 3 < _SECONDS:
        return 2 * side**3 / fastest(lambda: large @ large, device)
    # Without a kernel of its own a dtype can be a thousand times slower than the others.
    return 2 * _TRIAL_SIDE**3 / seconds


def memory_bandwidth(device: str) -> Finding:
    """Bytes read and written a second while a large tensor is copied."""
    import torch

    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    rate = 2 * _COPY_BYTES / fastest(lambda: target.copy_(source), device)
    if not torch.equal(source[:: 1 << 12], target[:: 1 << 12]):
        raise CheckFailed(
            "memory does not hold what was copied into it",
            cause=f"a copy of {_COPY_BYTES >> 20} MiB on {device} differs from its source",
            hint="test this machine's memory",
        )
    return Finding(
        f"{rate / 1e9:.3g} GB/s, read and written; the copy arrived whole",
        {"bytes_per_second": rate},
    )


def decomposition(device: str) -> Finding:
    """The truncated SVD as LoftQ uses it: seconds, and whether it is one."""
    import torch

    from loftq_cli.core.lowrank import truncated_svd
    from loftq_cli.core.residual import Residual

    generator = torch.Generator().manual_seed(0)
    R = torch.randn(_SVD_SIDE, _SVD_SIDE, generator=generator).to(device)
    residual = Residual.of(R)
    low_rank = truncated_svd(residual, _SVD_RANK)
    seconds = fastest(lambda: truncated_svd(residual, _SVD_RANK).S, device, seconds=0.0)
    U, Vh = low_rank.U.double(), low_rank.Vh.double()
    unit = torch.eye(_SVD_RANK, dtype=torch.float64, device=device)
    skew = max(float((U.T @ U - unit).norm()), float((Vh @ Vh.T - unit).norm()))
    whole = float(R.double().square().sum())
    left = float((R.double() - low_rank.dense().double()).square().sum())
    # Eckart and Young: what a truncated SVD leaves is ‖R‖² − Σσ².
    gap = abs(left - (whole - low_rank.energy)) / whole
    if not (skew < 1e-3 and gap < 1e-4):
        raise CheckFailed(
            "the SVD of this device is wrong",
            cause=f"its factors are {skew:.2g} from orthonormal, and the remainder is off by "
            f"{gap:.2g} of the whole",
            hint="reinstall torch; a broken LAPACK is the usual cause on a CPU",
        )
    return Finding(
        f"{seconds:.3g} s for rank {_SVD_RANK} of {_SVD_SIDE}×{_SVD_SIDE}; "
        f"remainder right to {gap:.1e}",
        {"seconds": seconds, "side": _SVD_SIDE, "rank": _SVD_RANK, "remainder_gap_relative": gap},
    )


def _dtypes() -> tuple[Any, ...]:
    import torch

    return torch.float32, torch.bfloat16, torch.float16


def _native_bfloat16(device: str) -> bool:
    import torch

    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    onednn = torch.backends.mkldnn.is_available()
    return onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fastest(work: Callable[[], Tensor], device: str, seconds: float = _SECONDS) -> float:
    """Seconds of the fastest of as many runs as fit into ``seconds``, but at least one.

    A run before them is not counted: it holds what happens once, such as the choice of a kernel.
    """
    work()
    _wait(device)
    best, spent, count = math.inf, 0.0, 0
    while not count or (spent < seconds and count < _REPEATS):
        began = time.perf_counter()
        work()
        _wait(device)
        took = time.perf_counter() - began
        best, spent, count = min(best, took), spent + took, count + 1
    return best


def _wait(device: str) -> None:
    """GPUs work behind the program's back."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
