"""A device that is not there, to count how often a program waits for it.

Within :class:`Elsewhere` a tensor moved to the device "meta" keeps its values, out of sight: on it
operations run as they do on a GPU, on nothing that is here, and only what is copied back can be
seen. What a GPU would be waited for is counted in ``waits``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
# What asks for values, or for a number of results that depends on them.
ASKING = (
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2",
    "aten::equal", "aten::repeat_interleave.Tensor", "aten::_linalg_eigh", "aten::_linalg_svd",
    "aten::_linalg_check_errors", "aten::linalg_eig",
)  # fmt: skip


class There(Tensor):
    """A tensor on the device; ``values`` are what nobody sees."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> There:
        found: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype,
            device=DEVICE,
        )  # fmt: skip
        found.values = values
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{function} outside of Elsewhere")


class Elsewhere(TorchDispatchMode):
    """Within, there is the device. `waits` says where this process had to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._pinned: list[Tensor] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = function.name()
        if name == "aten::is_pinned":
            return any(args[0] is each for each in self._pinned)
        if name == "aten::_pin_memory":
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        there = [each for each in tensors if isinstance(each, There)]
        here = [each for each in tensors if not isinstance(each, There) and each.ndim]
        copies = name in ("aten::_to_copy", "aten::copy_")
        assert copies or not (there and here), f"{name}: tensors on two devices"
        to = kwargs.get("device")
        arrives = bool(there) if to is None else to.type == DEVICE.type
        if to is not None and arrives:
            kwargs["device"] = torch.device("cpu")
        if copies:
            source, target = args[-1 if name == "aten::copy_" else 0], args[0]
            arrives = isinstance(target, There) if name == "aten::copy_" else arrives
            left = isinstance(source, There)
            alone = kwargs.pop("non_blocking", False) and any(source is p for p in self._pinned)
            if left != arrives and not alone:
                self.waits.append(name)
        elif there and (name in ASKING or _chosen_by_values(name, args)):
            self.waits.append(name)
        wrappers = {id(each.values): each for each in there}
        found = function(
            *tree_map_only(There, lambda each: each.values, args),
            **tree_map_only(There, lambda each: each.values, kwargs),
        )
        if not arrives:
            return found

        def wrapped(values: Tensor) -> There:
            same = wrappers.get(id(values))  # what an operation in place gives back
            return There(values) if same is None else same

        return tree_map_only(Tensor, wrapped, found)


def _chosen_by_values(name: str, args: Sequence[Any]) -> bool:
    """Whether this indexes with a mask."""
    masks = args[1] if name.startswith("aten::index") and len(args) > 1 else ()
    return isinstance(masks, (list, tuple)) and any(
        each is not None and each.dtype == torch.bool for each in masks
    )
