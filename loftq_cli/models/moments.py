"""What the linear layers of one stage are given on a text, summed up as it goes by.

    G = E[x·xᵀ]    (in × in), over all tokens that reach the layer

And where a quantized model runs beside the original, with x̃ what it gives the layer instead,

    H = E[x̃·x̃ᵀ]    D = E[(x − x̃)·x̃ᵀ]    (in × in), and E‖W·(x − x̃)‖²

The last comes from what the layer puts out for either, of which its bias is no part. Of a layer
that writes to the residual stream also what that has lost before it (`models.residual_stream`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import UnsupportedModel
from loftq_cli.models.layerwise import Stop, watched
from loftq_cli.models.residual_stream import Place, StreamLoss

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.core.input_moments import Drift

# G is symmetric: of its rows, so many at once, only what lies right of the diagonal is summed up.
_PANEL = 1024
NO_CALIBRATION = "use a start that needs no calibration text"


class StageInputs:
    """The inputs of some modules of one stage.

    Every batch is run once, or, where they are ``paired``, twice: through the original model, then
    as the quantized one has it.
    """

    def __init__(
        self,
        model: Any,
        groups: Mapping[str, str],
        device: str,
        *,
        paired: bool = False,
        calls: int = 0,
        places: Mapping[str, Place] | None = None,
    ) -> None:
        """``groups`` has for each module the first of those that are given the same tensor.

        A pass may end after so many ``calls`` of all modules; with 0 it goes to its end. Where
        inputs are paired, ``places`` are those of the modules that write to the residual stream.
        """
        import torch

        self._model = model
        self._groups = groups
        self._shared = {leader for module, leader in groups.items() if module != leader}
        self._paired = paired
        self._calls = calls
        self._sums = {
            leader: Moments(_shape(model, leader)[1], device, drifts=paired)
            for leader in dict.fromkeys(groups.values())
        }
        self._energies = {
            module: torch.zeros((), dtype=torch.float64, device=device) for module in groups
        }
        places = (places or {}) if paired else {}
        self._losses = {
            module: StreamLoss(place, _shape(model, module), device)
            for module, place in places.items()
        }
        self._blocks = {place.block for place in places.values()}
        self._earlier = {module for place in places.values() for module in place.before}
        self.begin(0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, all that the modules are given is summed up."""
        put_out = self._put_out if self._paired or self._calls else None
        with (
            watched(self._model, [*self._blocks], self._passes),
            watched(self._model, [*self._earlier], lambda *_: None, self._passes),
            watched(self._model, [*self._groups], self._see, put_out),
        ):
            yield

    def begin(self, tokens: int, *, whole: bool = True) -> None:
        """A batch of so many tokens comes, and unless ``whole`` it may end early."""
        self._tokens = tokens
        self._is_original = self._paired
        self._left = 0 if whole else self._calls
        # What the original gives its modules in this batch, and they put out, call by call.
        self._inputs: dict[str, deque[Tensor]] = {}
        self._outputs: dict[str, deque[Tensor]] = {}
        # What was summed up for a whole group, with its version.
        self._given: dict[str, list[tuple[Tensor, int]]] = {}
        for each in self._losses.values():
            each.begin()

    def now_quantized(self) -> None:
        """The same batch comes again, as the quantized model has it."""
        self._is_original = False
        self._left = self._calls

    def end(self) -> None:
        """The batch is over.

        Raises:
            UnsupportedModel: modules of one group were not given the same.
        """
        for module, leader in self._groups.items():
            if leader in self._shared and not self._identical(module, leader):
                raise UnsupportedModel(
                    f"{module} and {leader} are given the same inputs at times only",
                    cause="their moments were taken for one and the same",
                    hint=NO_CALIBRATION,
                )

    def finish(self) -> None:
        """The text is over."""
        for each in self._sums.values():
            each.finish()
        for module, loss in self._losses.items():
            loss.finish(self.tokens(module))

    def moments(self, module: str) -> Tensor:
        """E[x·xᵀ], or where inputs are paired E[x̃·x̃ᵀ]: float32 (in × in)."""
        return self._sums[self._groups[module]].mean

    def drift(self, module: str) -> Drift | None:
        """Where inputs are paired, how far those of the quantized model are from the original's."""
        stream = self._losses[module].mean if module in self._losses else None
        return self._sums[self._groups[module]].drift(float(self._energies[module]), stream)

    def tokens(self, module: str) -> int:
        """How many reached it."""
        return self._sums[self._groups[module]].tokens

    def broken(self, module: str) -> int:
        """How many of them were NaN, infinite, or too large for squares in float32."""
        return int(self._sums[self._groups[module]].broken)

    def _passes(self, name: str, x: Tensor) -> None:
        """What the residual stream begins with in a block, or a layer of earlier turns adds."""
        for loss in self._losses.values():
            loss.passes(name, x, original=self._is_original)

    def _see(self, module: str, x: Tensor) -> None:
        leader = self._groups[module]
        if self._is_original:
            if module == leader:
                self._inputs.setdefault(module, deque()).append(x.detach().clone())
            return
        if module == leader:
            self._sums[leader].add(x, self._before(self._inputs, module, x))
        if module in self._losses:
            self._losses[module].given(x)
        if leader in self._shared:
            self._given.setdefault(module, []).append((x, x._version))

    def _put_out(self, module: str, y: Tensor) -> None:
        import torch

        if self._is_original:
            # What comes next may be added to it in place.
            self._outputs.setdefault(module, deque()).append(y.detach().clone())
        elif self._paired and (before := self._before(self._outputs, module, y)) is not None:
            moved = before.float() - y.float()
            self._energies[module] += moved.square_().sum(dtype=torch.float64)
        self._left -= 1
        if self._left == 0:
            raise Stop

    def _before(self, kept: dict[str, deque[Tensor]], module: str, now: Tensor) -> Tensor | None:
        """The original's tensor of the same call.

        None where the call is not of every token: which tokens reach an expert is decided anew in
        the quantized model. There the inputs count as the original's.
        """
        calls = kept.get(module)
        before = calls.popleft() if calls else None
        if before is None or before.shape != now.shape or now.shape[:-1].numel() != self._tokens:
            return None
        return before

    def _identical(self, module: str, leader: str) -> bool:
        one, other = (self._given.get(each, []) for each in (module, leader))
        return len(one) == len(other) and all(
            x is y and version == now for (x, version), (y, now) in zip(one, other, strict=True)
        )


class Moments:
    """Σ x·xᵀ and, where they drift, Σ (x − x̃)·x̃ᵀ; and how many x there were."""

    def __init__(self, width: int, device: str, *, drifts: bool) -> None:
        import torch

        self.mean = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.cross = torch.zeros_like(self.mean) if drifts else None
        self.tokens = 0
        self.broken = torch.zeros((), dtype=torch.long, device=device)

    def add(self, x: Tensor, before: Tensor | None) -> None:
        """Some inputs, and where they drift what the original has in their place."""
        rows = self._rows(x)
        self.tokens += len(rows)
        fine = rows.norm(dim=1).isfinite()
        if self.cross is not None and before is not None:
            moved = self._rows(before) - rows
            fine &= moved.norm(dim=1).isfinite()
            self.cross.addmm_(moved.T, rows)
        self.broken += fine.logical_not().sum()
        for panel in self._panels():
            part = self.mean[panel, panel.start :]
            part.addmm_(rows[:, panel].T, rows[:, panel.start :])

    def finish(self) -> None:
        """Makes the sums means, that of x·xᵀ exactly symmetric."""
        for panel in self._panels():
            square = self.mean[panel, panel]
            square.copy_(square.triu() + square.triu(1).T)
            self.mean[panel.stop :, panel] = self.mean[panel, panel.stop :].T
        self.mean /= max(self.tokens, 1)
        if self.cross is not None:
            self.cross /= max(self.tokens, 1)

    def drift(self, energy: float, stream: Tensor | None = None) -> Drift | None:
        """Of a layer for which ``energy`` is Σ ‖W·(x − x̃)‖²; None where no others were given."""
        from loftq_cli.core.input_moments import Drift

        if self.cross is None:
            return None
        return Drift(self.cross, energy / max(self.tokens, 1), stream)

    def _rows(self, x: Tensor) -> Tensor:
        return x.detach().reshape(-1, x.shape[-1]).to(self.mean.device, self.mean.dtype)

    def _panels(self) -> Iterator[slice]:
        for start in range(0, len(self.mean), _PANEL):
            yield slice(start, min(start + _PANEL, len(self.mean)))


def _shape(model: Any, module: str) -> tuple[int, int]:
    """That of a linear module's weight, (out × in)."""
    found = model.get_submodule(module)
    out_features, in_features = found.weight.shape
    # Conv1D of GPT-2 has its weight transposed.
    if not hasattr(found, "in_features"):
        out_features, in_features = in_features, out_features
    return int(out_features), int(in_features)
