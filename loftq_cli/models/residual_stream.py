"""The residual stream of a layer block: which layers write to it, and what it has lost before them.

    block's output = its input + Σ c·y    over the layers in it that write to the stream

with y what they put out. That holds to rounding in most models: c is 1, in Granite its residual
multiplier. So the writers are found by least squares on a short text, whatever their names are.
Where it does not hold there are none: what a layer puts out is normalized before it is added
(Gemma, OLMo 2), or the experts of a mixture are added too.

What a writer's output is added to, h, is then the block's input and what the writers called before
it put out. Where attention and MLP read the same input (GPT-NeoX), their outputs come to the stream
together; that one counts as first that is called first, so nothing is made good twice.

What it has lost until then, h − h̃, the writer's target makes good (`core.calibrated`), for which
S = E[(h − h̃)·x̃ᵀ] is summed up while x̃ goes by. A bias in y is in h and in h̃.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

# All in units of a value's rounding, which is that of the block's input and output: what may be
# left, as a root mean square, and what a writer has to add.
_ROUNDINGS = 2.0
# What may be left of what the block adds; more says nothing, however coarse the dtype is.
_LEFT = 0.25
# Values are taken for no smaller than this share of the mean one.
_SMALLEST = 1e-3
# The least eigenvalue of the outputs' correlations; below it they cannot be told from each other.
_DISTINCT = 1e-4


@dataclass(frozen=True)
class Place:
    """What a layer's output y is added to: h/c = ``share`` · the block's input + Σ weight · y'.

    Those y' are what the writers ``before`` it put out, here with their weights.
    """

    block: str
    share: float
    before: Mapping[str, float]


def places(
    block: str, given: Any, output: Any, outputs: Mapping[str, Sequence[Tensor]]
) -> dict[str, Place]:
    """Of the layers that write to the stream in a block: what they add to.

    ``given`` is the hidden state that the block is called with and ``output`` what it gives back,
    a tensor or several with the hidden state first. ``outputs`` are what layers in it put out, call
    by call, in the order of their first calls.
    """
    import torch
    from torch.utils import _pytree

    end = next(iter(_pytree.tree_leaves(output)), None)
    if not (isinstance(given, torch.Tensor) and isinstance(end, torch.Tensor)):
        return {}
    if given.shape != end.shape or given.dtype != end.dtype or not end.is_floating_point():
        return {}
    # OPT's have no dimension for the windows.
    shapes = end.shape, end.flatten(0, -2).shape
    once = {name: ys[0] for name, ys in outputs.items() if len(ys) == 1 and ys[0].shape in shapes}
    found: dict[str, Place] = {}
    before: dict[str, float] = {}
    for name, c in _writers(given, end, once).items():
        found[name] = Place(block, 1 / c, {other: each / c for other, each in before.items()})
        before[name] = c
    return found


def _writers(given: Tensor, output: Tensor, outputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Each writer's c, if the output is the sum of what they put out and the input."""
    import torch

    if not outputs:
        return {}
    tensors = [given, output, *outputs.values()]
    eps = max(torch.finfo(each.dtype).eps for each in tensors)
    start, end, *ys = (each.detach().cpu().double().flatten() for each in tensors)
    # Each value in units of its own rounding, or some huge ones would decide alone.
    size = start.abs() + end.abs()
    size += _SMALLEST * size.mean()
    added, columns = (end - start) / size, torch.stack(ys, dim=1) / size[:, None]
    noise = _ROUNDINGS * eps * len(added) ** 0.5
    norms = columns.norm(dim=0)
    if not (norms.isfinite().all() and norms.all()):
        return {}
    columns /= norms
    correlations = columns.T @ columns
    if torch.linalg.eigvalsh(correlations)[0] < _DISTINCT:
        return {}
    # By more than rounding can do, which is amplified where outputs are alike.
    inverse = torch.linalg.inv(correlations)
    adds = (inverse @ (columns.T @ added)).abs() > noise * inverse.diagonal().sqrt()
    if not adds.any():
        return {}
    columns = columns[:, adds]
    weights = torch.linalg.lstsq(columns, added[:, None]).solution[:, 0]
    left = (added - columns @ weights).norm()
    if left > min(noise, _LEFT * float(added.norm())):
        return {}
    names = [name for name, those in zip(outputs, adds.tolist(), strict=True) if those]
    return dict(zip(names, (weights / norms[adds]).tolist(), strict=True))


class StreamLoss:
    """Σ (h − h̃)·x̃ᵀ of one writer, with h in units of its output."""

    def __init__(self, place: Place, shape: tuple[int, int], device: str) -> None:
        """``shape`` is that of W, (out × in)."""
        import torch

        self._block = place.block
        self._weights = {place.block: place.share, **place.before}
        self.mean = torch.zeros(shape, dtype=torch.float32, device=device)
        self._lost: Tensor | None = None  # (tokens × out), of this batch

    def begin(self) -> None:
        """A batch comes."""
        self._lost = None

    def passes(self, name: str, x: Tensor, *, original: bool) -> None:
        """The block is given this, or a layer puts it out: in the original, or as it is now."""
        if name not in self._weights:
            return
        weight = self._weights[name] * (1 if original else -1)
        rows = _rows(x)
        self._lost = rows * weight if self._lost is None else self._lost.add_(rows, alpha=weight)

    def given(self, x: Tensor) -> None:
        """The writer is given x̃.

        Raises:
            UnsupportedModel: its block was not called as it was in the trace.
        """
        if self._lost is None:
            raise UnsupportedModel(
                f"{self._block} is not always called as a module",
                cause="what its residual stream begins with was not seen",
                hint="--calibration-order parallel",
            )
        self.mean.addmm_(self._lost.T, _rows(x))

    def finish(self, tokens: int) -> None:
        """Makes the sum a mean of so many tokens."""
        self.mean /= max(tokens, 1)


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).float()
