"""What the experts of a mixture are given: each one the tokens that the router sends to it.

transformers holds all experts of a block in one module, with stacked parameters, so no layer of an
expert is there to be watched. What reaches the module is kept instead: the hidden states of all
tokens once, and where each goes. One expert's part of them is then run alone, when its turn comes:

    hidden states (tokens × hidden), top-k indices (tokens × k)      as the block gave them
    inputs of expert e                                               those of its tokens, run again

So what is held does not grow with the number of experts, and what lies between an expert's two
matrices (as wide as all experts together, for every token) never exists for more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from loftq_cli.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    # Given a parameter's name, an expert, the inputs and the matrix, what they give.
    Product = Callable[[str, int, Tensor, Tensor], Tensor]
    Before = Product | None


class ExpertPlace(NamedTuple):
    """Where a model holds one matrix of one expert."""

    module: str  # path of the module that holds all experts of its block
    parameter: str  # of which stack (experts × out × in) it is a part
    expert: int
    part: int  # which of the matrices that lie one below the other in it
    parts: int


def is_routed(module: Module) -> bool:
    """Whether this holds experts, and takes hidden states, indices and weights of the router.

    All classes under transformers' `use_experts_implementation` do. Of those that multiply from the
    other side the products are others than `linear`.
    """
    return getattr(module, "is_transposed", None) is False and hasattr(module, "_apply_gate")


@contextmanager
def with_products(experts: Any, product: Product) -> Iterator[None]:
    """Within, every product with an expert's matrix is what ``product`` says.

    Experts are computed one after the other then, whatever the model is set to.
    """
    from torch.nn.functional import linear
    from torch.overrides import TorchFunctionMode

    class Products(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func is linear and len(args) == 2 and (found := _find(experts, args[1])) is not None:
                return product(*found, *args)
            return func(*args, **(kwargs or {}))

    config = experts.config
    chosen = config._experts_implementation
    config._experts_implementation = "eager"
    try:
        with Products():
            yield
    finally:
        config._experts_implementation = chosen


def _find(experts: Module, weight: Tensor) -> tuple[str, int] | None:
    """Of which parameter and expert this is the matrix."""
    storage = weight.untyped_storage().data_ptr()
    for name, stack in experts.named_parameters(recurse=False):
        if stack.ndim != 3 or stack.untyped_storage().data_ptr() != storage:
            continue
        first = weight.storage_offset() - stack.storage_offset()
        if 0 <= first < stack.numel():
            return name, first // stack.stride(0)
    return None


class Routed:
    """The tokens that reached a module of experts, batch by batch."""

    def __init__(self, experts: Module) -> None:
        """``experts``: one for which :func:`is_routed` holds."""
        self._experts = experts
        self._hidden: list[Tensor] = []
        self._indices: list[Tensor] = []

    def keep(self, hidden: Tensor, indices: Tensor) -> None:
        """A batch as the module is given it; it is kept on the CPU."""
        self._hidden.append(hidden.detach().reshape(-1, hidden.shape[-1]).cpu())
        self._indices.append(indices.detach().reshape(len(self._hidden[-1]), -1).cpu())

    def tokens_of(self, expert: int) -> list[Tensor]:
        """For each batch the rows of its tokens that go to this expert."""
        return [(indices == expert).any(dim=1).nonzero()[:, 0] for indices in self._indices]

    def given(
        self, expert: int, parameter: str, tokens: list[Tensor], device: str, before: Before = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What an expert's matrix in this stack is given on these rows, and what it puts out.

        ``before`` says what the products before it are; None: what the model has them be.

        Yields:
            of each batch with rows the inputs (rows × in) and outputs (rows × out).
        """
        for hidden, rows in zip(self._hidden, tokens, strict=True):
            if len(rows):
                hidden = hidden[rows].to(device)
                yield _given(self._experts, expert, parameter, hidden, before)


class _Seen(Exception):
    """Ends a pass through the experts with what was looked for."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.x, self.y = x, y


def _given(
    experts: Any, expert: int, parameter: str, hidden: Tensor, before: Before
) -> tuple[Tensor, Tensor]:
    """The module's own forward with every token sent to one expert, up to one product of it."""
    import torch
    from torch.nn.functional import linear

    def see(name: str, number: int, x: Tensor, weight: Tensor) -> Tensor:
        if name == parameter:
            raise _Seen(x, linear(x, weight))
        return linear(x, weight) if before is None else before(name, number, x, weight)

    indices = torch.full((len(hidden), 1), expert, device=hidden.device)
    weights = torch.ones((len(hidden), 1), dtype=hidden.dtype, device=hidden.device)
    try:
        with torch.no_grad(), with_products(experts, see):
            experts(hidden, indices, weights)
    except _Seen as seen:
        return seen.x, seen.y
    raise UnsupportedModel(
        f"{type(experts).__name__} does not multiply by {parameter} as other experts do",
        hint="use a start that needs no calibration text",
    )
