"""What is kept of a run of a model between two of its stages, in memory or on the disk."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.tensors import tensor_memory
from loftq_cli.checkpoint.writer import disk_errors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Of the memory that may be used, what may be taken by the hidden states of all streams.
FOR_HIDDEN_STATES = 0.125


class Stream:
    """A model's run on batches of token ids (windows × length), between two stages of it.

    Of each batch the output of the last layer block that ran in each stack is kept: one hidden
    state for each token.

    Attributes:
        done: stages that have run on all batches.
    """

    def __init__(self, batches: Sequence[Tensor], folder: Path | None = None) -> None:
        """What is kept lies in a folder of its own in ``folder``, but for that of the first batch.

        Without one it is in memory.
        """
        self.batches = batches
        self.done = 0
        self._folder = None if folder is None else Path(tempfile.mkdtemp(dir=folder))
        self._kept: list[dict[str, Any]] = [{} for _ in batches]

    def keep(self, number: int, stack: str, output: Any) -> None:
        """Keeps what the stack's last layer block put out for this batch, for that before it.

        Tensors that are those of the first batch are shared with it. In T5 the position bias is
        part of the output (heads × length²), the same for every batch.
        """
        import torch
        from torch.utils import _pytree

        leaves, structure = _pytree.tree_flatten(output)
        others = _pytree.tree_leaves(self._kept[0].get(stack))
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            kept = leaf.cpu()
            other = others[place] if len(others) == len(leaves) else None
            if isinstance(other, torch.Tensor) and torch.equal(kept, other):
                leaves[place] = other
            elif number and self._folder is not None:
                name = f"{number}-{list(self._kept[0]).index(stack)}-{place}"
                leaves[place] = _OnDisk.write(self._folder / name, kept)
            else:
                leaves[place] = kept
        self._kept[number][stack] = _pytree.tree_unflatten(leaves, structure)

    def output(self, number: int, stack: str, device: str) -> Any:
        """What is kept of a batch, on a device."""
        import torch
        from torch.utils import _pytree

        def moved(leaf: Any) -> Any:
            leaf = leaf.read() if isinstance(leaf, _OnDisk) else leaf
            return leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf

        return _pytree.tree_map(moved, self._kept[number][stack])


@dataclass(frozen=True)
class _OnDisk:
    path: Path
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def write(cls, path: Path, tensor: Tensor) -> _OnDisk:
        memory = tensor_memory(tensor)
        with disk_errors(path, memory.nbytes):
            path.write_bytes(memory)
        return cls(path, tensor.shape, tensor.dtype)

    def read(self) -> Tensor:
        import torch

        tensor = torch.empty(self.shape, dtype=self.dtype)
        with disk_errors(self.path), self.path.open("rb") as file:
            file.readinto(tensor_memory(tensor))
        return tensor
