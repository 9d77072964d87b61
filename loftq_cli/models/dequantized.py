"""Integer codes as the weights of a plain model: dequantized one after the other while it is read.

Neither gptqmodel nor compressed-tensors is needed for this. The model takes the memory of its
weights in the dtype asked for; gptqmodel alone keeps codes packed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.containers import containers
from loftq_cli.containers.base import Weight
from loftq_cli.containers.integers import Integers
from loftq_cli.errors import CorruptCheckpoint
from loftq_cli.formats import INTEGER_BLOCK_SIZES, SHORT_NAMES
from loftq_cli.models.dtypes import stored_dtype
from loftq_cli.models.source import quantization_method
from loftq_cli.models.stacking import Restacked

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.models.architecture import Architecture


@dataclass(frozen=True)
class IntegerCodes:
    """The weights of a checkpoint that are integer codes, and the container that they are in.

    ``restacked`` are those, by name, that transformers has no rule to put into stacks.
    """

    container: Integers
    weights: Sequence[Weight]
    restacked: Mapping[str, Restacked]

    @contextmanager
    def state_dict(self, checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
        """The checkpoint as `from_pretrained` takes it in place of a directory: lazily.

        Every value has ``value[...]``, as a slice of safetensors has, which is all that
        transformers 5 asks of one: a weight is read and dequantized when its turn comes.
        """
        from safetensors import safe_open

        container = self.container
        codes = {part.name for each in self.weights for part in container.planned(each)}
        with ExitStack() as files:
            state: dict[str, Any] = {}
            for header in checkpoint.headers.values():
                opened = files.enter_context(safe_open(header.path, framework="pt"))
                names = header.tensors.keys() - codes
                state.update((name, opened.get_slice(name)) for name in names)
            stacks: dict[str, list[_Lazy]] = {}
            for weight in self.weights:
                lazy = _Lazy(self.container, checkpoint, weight)
                if (restacked := self.restacked.get(weight.name)) is None:
                    state[weight.name] = lazy
                else:
                    stacks.setdefault(restacked.place.tensor, []).append(lazy)
            for parameter, matrices in stacks.items():
                state[parameter] = _LazyStack(matrices, self.restacked)
            yield state


def integer_codes(
    architecture: Architecture, config: dict[str, Any], checkpoint: Checkpoint
) -> IntegerCodes | None:
    """The integer codes of a checkpoint whose `quantization_config` is one that loftq writes.

    Of others, codes and zero points may mean something else: they are for their own libraries.
    """
    method = quantization_method(config)
    for kind in containers():
        if not (issubclass(kind, Integers) and kind.name == method):
            continue
        told = config["quantization_config"]
        weights = _weights(kind, architecture, config, checkpoint)
        skipped = told.get(kind.skip_list) or []
        for block_size in INTEGER_BLOCK_SIZES:
            container = kind(kind.number_types[0], block_size)
            if weights and container.quantization_config(weights, skipped, None) == told:
                found = {each.name: architecture.stacks.restacked(each.name) for each in weights}
                restacked = {name: each for name, each in found.items() if each is not None}
                _require_whole(restacked.values())
                return IntegerCodes(container, weights, restacked)
    return None


def _require_whole(restacked: Iterable[Restacked]) -> None:
    """Refuses stacks of which a matrix is missing: there would be anything in its place."""
    count = Counter((each.place.tensor, each.place.count) for each in restacked)
    for (parameter, whole), found in count.items():
        if found != whole:
            raise CorruptCheckpoint(
                f"no file has all matrices of {parameter}",
                cause=f"there are {found} of {whole}",
                hint="copy the directory again from where it was written",
            )


def _weights(
    kind: type[Integers],
    architecture: Architecture,
    config: dict[str, Any],
    checkpoint: Checkpoint,
) -> list[Weight]:
    """All that have codes in this container; none where one is no linear layer's.

    The model class tells their shapes, and how many words there are tells their bits.
    """
    dtype = SHORT_NAMES.get(stored_dtype(config) or "", "F32")
    parameters = architecture.parameters_of(sorted(kind.weights_in(checkpoint.tensors)))
    found = []
    for tensor, parameter in parameters.items():
        shape, transposed = architecture.expert_shape(tensor), False
        module = (parameter if shape is None else tensor).removesuffix(".weight")
        if shape is None:
            shape, transposed = architecture.linear_shape(module)
        if shape is None:
            return []
        codes = checkpoint.tensors[kind.codes_of(tensor)][1]
        bits = 32 * codes.elements // math.prod(shape)
        found.append(Weight(tensor, module, shape, bits, dtype, transposed))
    return found


@dataclass(frozen=True)
class _Lazy:
    container: Integers
    checkpoint: Checkpoint
    weight: Weight

    def __getitem__(self, whole: object) -> Tensor:
        stored = self.container.read(self.checkpoint.tensors, self.weight, "cpu")
        Q = self.container.runtime(stored)
        return Q.t() if self.weight.transposed else Q


@dataclass(frozen=True)
class _LazyStack:
    """The matrices of all experts in one tensor, which is made when its turn comes."""

    matrices: Sequence[_Lazy]
    restacked: Mapping[str, Restacked]

    def __getitem__(self, whole: object) -> Tensor:
        import torch

        stack = None
        for lazy in self.matrices:
            Q, into = lazy[whole], self.restacked[lazy.weight.name]
            if stack is None:
                stack = torch.empty(into.shape, dtype=Q.dtype)
            into.part_of(stack).copy_(Q)
        assert stack is not None
        return stack
