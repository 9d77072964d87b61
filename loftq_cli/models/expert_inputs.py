"""The moments of what experts are given: those of one matrix at a time (see `routed.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loftq_cli.models.moments import Moments
from loftq_cli.models.quantized_layers import QuantizedLayer, quantized_product
from loftq_cli.models.routed import ExpertPlace, Routed, is_routed

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.core.input_moments import Drift
    from loftq_cli.models.architecture import Architecture

# An expert that fewer tokens reached than this share of a matrix's inputs counts as not reached:
# what a handful of tokens agree on is chance.
_FEWEST = 16


def places_in(
    architecture: Architecture, model: Any, experts: Iterable[str]
) -> dict[str, ExpertPlace]:
    """Where the model holds those experts whose inputs can be seen, as they are computed."""
    found = {module: architecture.stacks.expert_place(f"{module}.weight") for module in experts}
    known = {
        module: place
        for module, place in found.items()
        if place is not None and is_routed(model.get_submodule(place.module))
    }
    return dict(sorted(known.items(), key=lambda each: _when(model, each[1])))


def _when(model: Any, place: ExpertPlace) -> tuple[str, int, int, int]:
    """Modules under `use_experts_implementation` define matrices as they multiply with them."""
    names = [name for name, _ in model.get_submodule(place.module).named_parameters(recurse=False)]
    return place.module, place.expert, names.index(place.parameter), place.part


class ExpertInputs:
    """The inputs of the experts of one module, with the methods of `moments.StageInputs`.

    Where batches are paired, an expert's tokens are those that the quantized model sends to it;
    beside them stands what the original would give it for the same tokens, wherever it sends them.
    """

    def __init__(
        self,
        experts: Any,
        places: Mapping[str, ExpertPlace],
        device: str,
        quantized: Callable[[str], QuantizedLayer] | None,
    ) -> None:
        """Paired where ``quantized`` tells what has become of an expert's earlier matrices."""
        self._experts = experts
        self._places = places
        self._device = device
        self._quantized = quantized
        self._original = Routed(experts)
        # Without a second stream the one is both.
        self._runtime = self._original if quantized is None else Routed(experts)
        self._known: tuple[str, int] | None = None  # the stack and expert that these are of:
        self._sums: Moments
        self._energies: dict[int, float]  # by part of the stack's rows

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within, all that the experts are given is kept."""

        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._now.keep(*(*args, *kwargs.values())[:2])

        handle = self._experts.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def begin(self, tokens: int, *, whole: bool = True) -> None:
        """A batch comes."""
        self._now = self._original

    def now_quantized(self) -> None:
        """The same batch comes again, as the quantized model has it."""
        self._now = self._runtime

    def end(self) -> None:
        """The batch is over."""

    def finish(self) -> None:
        """The text is over."""

    def moments(self, module: str) -> Tensor:
        """E[x·xᵀ], or where inputs are paired E[x̃·x̃ᵀ]: float32 (in × in), zero where unseen."""
        found = self._of(module).mean
        return found if self.tokens(module) else found.new_zeros(found.shape)

    def drift(self, module: str) -> Drift | None:
        """Where inputs are paired, how far those of the quantized model are from the original's."""
        if not self.tokens(module):
            return None
        return self._of(module).drift(self._energies[self._places[module].part])

    def tokens(self, module: str) -> int:
        """How many reached it, by the paths of the quantized model if there is one; 0 for a few."""
        place = self._places[module]
        tokens = sum(map(len, self._runtime.tokens_of(place.expert)))
        return tokens if tokens * _FEWEST >= self._width(place.parameter) else 0

    def broken(self, module: str) -> int:
        """How many of them were NaN, infinite, or too large for squares in float32."""
        return int(self._of(module).broken)

    def _width(self, parameter: str) -> int:
        return int(self._experts.get_parameter(parameter).shape[2])

    def _of(self, module: str) -> Moments:
        place = self._places[module]
        if self._known != (place.parameter, place.expert):
            self._sum_up(place)
            self._known = place.parameter, place.expert
        return self._sums

    def _sum_up(self, place: ExpertPlace) -> None:
        """What the expert's matrices are given that are one in the stack."""
        import torch

        parameter, expert, paired = place.parameter, place.expert, self._quantized is not None
        self._sums = Moments(self._width(parameter), self._device, drifts=paired)
        self._energies = dict.fromkeys(range(place.parts), 0.0)
        which = expert, parameter, self._runtime.tokens_of(expert), self._device
        if self._quantized is None:
            for x, _ in self._runtime.given(*which):
                self._sums.add(x, None)
        else:
            before = quantized_product(self._places, self._quantized, self._device)
            pairs = zip(
                self._original.given(*which), self._runtime.given(*which, before), strict=True
            )
            for (x, y), (now, leaves) in pairs:
                self._sums.add(now, x)
                for part, moved in enumerate((y.float() - leaves.float()).chunk(place.parts, -1)):
                    self._energies[part] += float(moved.square().sum(dtype=torch.float64))
        self._sums.finish()
