"""One step of the alternation on CUDA: a product, and one kernel for all that follows.

The low rank is multiplied by the library that does it best, and a program of ``triton_kernels.py``
takes whole blocks from there: target, search, codes, what they leave and its square, each value
read once and written once. Only scales that are rounded all together need a second launch.
"""

from contextlib import AbstractContextManager
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from loftq_cli.core.absmax import SMALLEST, Starts, starts_for
from loftq_cli.core.blockwise import BlockwiseFormat
from loftq_cli.core.codebooks import Codebook, Levels
from loftq_cli.core.extrapolation import Extrapolation
from loftq_cli.core.integers import IntegerFormat
from loftq_cli.core.layouts import Layout, layout
from loftq_cli.core.residual import Residual
from loftq_cli.core.steps import Factors
from loftq_cli.core.transfers import send

# Values that one program works on, if its blocks are no longer; and the most that a block may hold
# so that one program can.
TILE, LONGEST = 2048, 1 << 15
# Values for each thread, of a longer block.
_A_THREAD = 16
# No fused multiply-adds, which round less often than the reference.
NO_CONTRACTION = {"enable_fp_fusion": False}


def takes(W: Tensor, block_size: int) -> bool:
    """Whether the kernels work on blocks of this size of ``W``."""
    return W.is_cuda and block_size <= LONGEST and obstacle(W.device) is None


@cache
def obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot run on this GPU: None if they can, else the first line of the error.

    Triton comes with torch's CUDA builds for Linux only, does not know every GPU and needs a C
    compiler. The reference does without.
    """
    try:
        TritonSteps(
            torch.zeros(1, 32, device=device), IntegerFormat(4, 32), torch.float32
        ).quantize()
    except Exception as error:  # whatever a compiler and a driver may say
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


class TritonSteps:
    """The steps of :class:`steps.ReferenceSteps` for codes in blocks, as CUDA kernels.

    The absmax, or scales, are searched for, or the format's own. The same target gives the same
    codes for the same absmax; the sums of a search are added up in another order.
    """

    def __init__(
        self,
        W: Tensor,
        fmt: BlockwiseFormat | IntegerFormat,
        dtype: torch.dtype,
        *,
        search: bool = False,
    ) -> None:
        """``dtype`` is what the runtime dequantizes to."""
        self.W = W = W.contiguous()  # as blocks are counted
        self.search = search
        self.layout = layout(fmt, (W.shape[0], W.shape[1]), dtype)
        self.launches = Launches(W, self.layout)

    def quantize(
        self,
        carried: Factors | None = None,
        like: Any = None,
        extrapolation: Extrapolation | None = None,
    ) -> tuple[Any, Residual]:
        form, launches = self.layout, self.launches
        product = None if carried is None else carried.left @ carried.right
        ahead = None if carried is None else extrapolation
        stop = form.codes(slice(0, self.W.numel())).stop
        codes = self.W.new_empty(stop, dtype=form.code_dtype)
        scales = self.W.new_empty(launches.blocks, dtype=torch.float32)
        rest = self.W.new_empty(self.W.shape, dtype=torch.float32)
        if not self.search:
            energy = launches.step(product, ahead, scales, codes, rest)
            quantized = form.stored(codes, scales)
            if form.rounds_together:
                energy = launches.leave(quantized, None, rest)
            return quantized, Residual.of(rest, carried and carried.subspace, energy)
        previous = None if like is None else form.parts(like)[1]
        starts = starts_for(form.levels, warm=like is not None)
        if form.rounds_together:
            # What will be read back is not known before the last block.
            launches.step(product, ahead, scales, None, None, starts, previous)
            quantized = form.stored(codes, scales)
            restored = form.parts(quantized)[1]
            energy = launches.step(product, ahead, restored, codes, rest, given=True)
        else:
            energy = launches.step(product, ahead, scales, codes, rest, starts, previous)
            quantized = form.stored(codes, scales)
        return quantized, Residual.of(rest, carried and carried.subspace, energy)

    def remainder(self, quantized: Any, carried: Factors) -> float:
        product = carried.left @ carried.right if carried.left.shape[1] else None
        return float(self.launches.leave(quantized, product))


class Launches:
    """The kernels of a weight of this layout, launched."""

    def __init__(self, W: Tensor, form: Layout) -> None:
        self.W = W
        self.layout = form
        self.blocks = -(-W.numel() // form.block_size)
        across = width(form.block_size)
        count = max(TILE // across, 1)
        self.programs = -(-self.blocks // count)
        self.sizes = (self.blocks, W.numel())
        self.options: dict[str, Any] = {"num_warps": warps(across), **NO_CONTRACTION}
        self.constants: dict[str, Any] = {
            "ROUNDING": form.rounding, "BLOCKS": count, "SIZE": form.block_size, "WIDTH": across,
        }  # fmt: skip

    def step(
        self,
        product: Tensor | None,
        extrapolation: Extrapolation | None,
        scales: Tensor,
        codes: Tensor | None,
        residual: Tensor | None,
        starts: Starts | None = None,
        previous: Tensor | None = None,
        *,
        given: bool = False,
    ) -> Tensor:
        """‖W − Q‖² (a float64 scalar on the device) of the target W − ``product``.

        Or of what an ``extrapolation`` of the product says is carried instead; it remembers that
        when ``codes`` are written, which is the last time that it is asked.

        ``scales`` (blocks,) are ``given``, or become what a search from ``starts`` around the
        ``previous`` ones finds, or the format's own. ``codes`` and ``residual`` W − Q are written
        if they are wanted.
        """
        from loftq_cli.core import triton_kernels as kernels

        W, form = _bits(self.W), self.layout
        energies = self._energies()
        factors = scales if starts is None else _factors(starts, W.device)
        way = "given" if given else "plain" if starts is None else "searched"
        memory = later = W
        if extrapolation is not None:
            memory = later = extrapolation.memory
            if codes is not None:
                # Not in place: who reads a value need not be who writes it.
                extrapolation.memory = later = torch.empty_like(memory)
        with self._device():
            kernels.step[(self.programs,)](
                W,
                W if product is None else product,
                memory,
                later,
                *((0.0,) * 4 if extrapolation is None else extrapolation.weights),
                scales if previous is None else previous,
                factors,
                len(starts.factors) if starts else 0,
                starts.passes if starts else 0,
                SMALLEST,
                form.largest,
                scales,
                W if codes is None else codes,
                W if residual is None else residual,
                energies,
                *self.sizes,
                FROM=way,
                WARM=previous is not None,
                CARRIED=product is not None,
                AHEAD=extrapolation is not None,
                ENCODE=codes is not None,
                **tables(form.levels),
                **self.constants,
                **self.options,
            )
        return energies.sum()

    def leave(
        self, quantized: Any, product: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        """‖W − Q − product‖² (a float64 scalar on the device), that matrix in ``residual``."""
        from loftq_cli.core import triton_kernels as kernels

        W, form = _bits(self.W), self.layout
        codes, scales = form.parts(quantized)
        packed = isinstance(form.levels, Codebook)
        energies = self._energies()
        table = scales
        if isinstance(form.levels, Codebook):
            table = _levels(form.levels, W.device)
        with self._device():
            kernels.leave[(self.programs,)](
                W,
                W if product is None else product,
                codes,
                scales,
                table,
                W if residual is None else residual,
                energies,
                *self.sizes,
                CARRIED=product is not None,
                KEEP=residual is not None,
                PACKED=packed,
                **self.constants,
                **self.options,
            )
        return energies.sum()

    def _energies(self) -> Tensor:
        return torch.zeros(self.programs, dtype=torch.float64, device=self.W.device)

    def _device(self) -> AbstractContextManager[Any]:
        """Triton launches where torch is."""
        return torch.cuda.device_of(self.W)


def width(size: int) -> int:
    """The next power of two: tiles have no other sizes."""
    return 1 << (size - 1).bit_length()


def warps(across: int) -> int:
    """For a program that works on ``TILE`` values, or so many ``across`` if these are more."""
    return min(max(across // (32 * _A_THREAD), 4), 32)


def _bits(W: Tensor) -> Tensor:
    """As the kernels read it: bfloat16 as its bits."""
    return W.view(torch.uint16) if W.dtype == torch.bfloat16 else W


@lru_cache(maxsize=8)
def _factors(starts: Starts, device: torch.device) -> Tensor:
    return send(torch.tensor(starts.factors), device)


@lru_cache(maxsize=8)
def _levels(book: Codebook, device: torch.device) -> Tensor:
    return send(book.level_tensor(), device)


@lru_cache(maxsize=8)
def tables(levels: Levels) -> dict[str, Any]:
    """What is compiled into the kernels."""
    if isinstance(levels, Codebook):
        borders, ascending = levels.midpoints().tolist(), levels.ascending().tolist()
        codes, share = levels.order, 0.0
    else:
        borders, ascending = [], [float(levels.lowest), float(levels.highest)]
        codes, share = (), levels.plain_share
    return {"BORDERS": tuple(borders), "LEVELS": tuple(ascending), "CODES": codes, "SHARE": share}
