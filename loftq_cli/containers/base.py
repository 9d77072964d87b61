"""What every container is asked: how weights lie in files, and who reads them there.

An object is a container with the options of one run: it is chosen once, and asked for each layer
with the layer's bits. Nothing here needs a weight to be read before, and torch is imported only by
what works on tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from loftq_cli.checkpoint.safetensors import Header, TensorInfo, shown
from loftq_cli.checkpoint.tensors import load_tensor
from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.errors import InvalidSetting
from loftq_cli.formats import DEFAULT_CONTAINER

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.core.steps import Quantizer

Tensors: TypeAlias = Mapping[str, tuple[Header, TensorInfo]]


class Form(Protocol):
    """The options of a number format, by the settings of a run or by its report."""

    @property
    def quant_type(self) -> str: ...
    @property
    def block_size(self) -> int | None: ...
    @property
    def double_quant(self) -> bool: ...
    @property
    def quant_storage(self) -> str | None: ...


@dataclass(frozen=True)
class Weight:
    """A linear layer's weight before anyone reads it."""

    name: str  # of its tensor in the source, `X.weight`
    module: str  # its layer, as the model class calls it
    shape: tuple[int, int]  # (out, in)
    bits: int  # what a code of it tells
    dtype: str  # of the source, as safetensors spells it
    transposed: bool = False  # the source has it as (in, out)


@dataclass(frozen=True)
class StoredWeight:
    """The tensors that a weight became, read from files, and what a description beside them says.

    Their dtypes and shapes are those of the container, or they are refused: kernels trust the
    shapes that they are given and read past the end of a buffer that is too small for them.
    """

    weight: Weight
    parts: Mapping[str, Tensor]
    description: Mapping[str, Any] = field(default_factory=dict)

    @property
    def codes(self) -> Tensor:
        """What the tensor became that has the weight's own name, where one has."""
        return self.parts[self.weight.name]


class Damaged(ValueError):
    """The tensors of a stored weight are not what they should be; the text says why."""


@dataclass(frozen=True)
class Container(ABC):
    """One container. A module of this package has its class as ``CONTAINER``.

    ``quant_type``, ``block_size`` and ``double_quant`` are what the report says of the format, and
    ``quant_storage`` is what the tensors of packed codes are called, where that can be chosen.
    """

    quant_type: str
    block_size: int | None = None
    double_quant: bool = False
    quant_storage: str | None = None

    # As `quantization_config` and the people who load it call it.
    name: ClassVar[str]
    # Bits that a code can tell, and names of its formats: the first is that unless asked.
    all_widths: ClassVar[tuple[int, ...]]
    number_types: ClassVar[tuple[str, ...]]
    block_sizes: ClassVar[tuple[int, ...]] = ()
    # The container that takes what this one does not.
    instead: ClassVar[str] = DEFAULT_CONTAINER
    # Which of the options of a number format above it has.
    options: ClassVar[tuple[str, ...]] = ()
    quantizes: ClassVar[bool] = True
    # Whether scales are searched for where a start wants that.
    searches: ClassVar[bool] = False
    # Bytes a weight that its quantizer holds beside codes, where that works on whole matrices: the
    # residual and, for the last one, what it is made of, five float32. None: it goes by pieces.
    whole_bytes: ClassVar[int | None] = 20
    # Why starts that need moments of a layer's inputs are not for it; None: they are.
    why_uncalibrated: ClassVar[str | None] = "errors of rounding cannot be passed on in its codes"
    # A warning for everyone who chooses it.
    warning: ClassVar[str | None] = None
    # What has to be installed for transformers to load it, by the names that one imports.
    libraries: ClassVar[tuple[str, ...]] = ()
    # Why experts stay in 16 bits unless it is said otherwise; None: they are quantized. And whether
    # anything reads such ones.
    why_experts_stay: ClassVar[str | None] = (
        "an expert: nothing that loads this container takes quantized ones"
    )
    takes_experts: ClassVar[bool] = False
    # Whether loftq itself loads experts of it into stacks for which transformers has no rule.
    restacks: ClassVar[bool] = False
    # Whether servers want one width for the layers that they hold as one (`fused.py`).
    even_when_fused: ClassVar[bool] = False
    # Whether a model with an adapter keeps the codes as they are, in layers that `holds` knows.
    stays_packed: ClassVar[bool] = True
    # Whether the config has to name the dtype of the model: the weights' tensors may have others.
    wants_dtype: ClassVar[bool] = False
    # What one says of the layers that the weights are loaded into, and the list in
    # `quantization_config` of the modules that are none.
    layer_class: ClassVar[str] = ""
    skip_list: ClassVar[str] = ""
    # Whether its reader takes the names in that list for whole paths only.
    skips_whole_paths: ClassVar[bool] = False

    @classmethod
    def of(cls, form: Form) -> Container:
        """The container with what it takes of these options.

        Raises:
            UsageError: they contradict it.
        """
        return cls(cls.number_types[0])

    @classmethod
    def weights_in(cls, names: Iterable[str]) -> set[str]:
        """The weights (`X.weight`) that are quantized like this in a checkpoint of such tensors."""
        return set()

    @classmethod
    def missing_libraries(cls) -> list[str]:
        """Of its libraries, those that are not installed here."""
        return [name for name in cls.libraries if find_spec(name) is None]

    @classmethod
    def holds(cls, module: Any) -> bool:
        """Whether a layer of a loaded model is one that such weights are loaded into."""
        return cls.quantizes and type(module).__name__ == cls.layer_class

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits that a code can tell in this format."""
        return self.all_widths

    def skipped_stack(self, stack: str) -> str:
        """What the skip list has for all experts of a block, by the module that holds them."""
        return stack

    def code_bits(self, bits: int) -> int:
        """What a code of so many bits takes in the file."""
        return bits

    def scale_bytes(self, shape: tuple[int, int], bits: int) -> int:
        """Bytes of what lies beside the codes of a weight (out, in): the scales, mostly."""
        return 0

    def why_unfit(self, weight: Weight) -> str | None:
        """Why a weight cannot be stored with these options; None: it can."""
        return None

    def require_fit(self, weights: Sequence[Weight]) -> None:
        """Refuses weights that cannot be stored with these options.

        Raises:
            InvalidSetting: such a weight; the hint is what would take all of them.
        """

        def misfit(container: Container) -> tuple[Weight, str] | None:
            told = ((each, container.why_unfit(each)) for each in weights)
            return next(((each, reason) for each, reason in told if reason is not None), None)

        found = misfit(self)
        if found is None:
            return
        weight, cause = found
        sizes = [each for each in self.block_sizes if not misfit(replace(self, block_size=each))]
        if sizes:
            what = f"block size {self.block_size} does not fit {weight.module}"
            hint = f"--block-size {max(sizes)}"
        else:
            what = f"{weight.module} does not fit into {self.name}"
            hint = f"--container {self.instead}"
        raise InvalidSetting(what, cause=cause, hint=hint)

    @abstractmethod
    def planned(self, weight: Weight) -> list[PlannedTensor]:
        """Names, dtypes and shapes of what a weight becomes."""

    def working_bytes(self, weight: Weight) -> int:
        """Memory that codes and scales of a weight take while it is worked on."""
        return sum(tensor.nbytes for tensor in self.planned(weight))

    # What follows is asked only where something is quantized.

    def quantization_config(
        self, weights: Sequence[Weight], skipped: Sequence[str], dtype: str | None
    ) -> dict[str, Any]:
        """What transformers reads in config.json.

        Args:
            weights: all that are quantized.
            skipped: the modules that are not.
            dtype: that of most weights; without it, what depends on it is left out.
        """
        raise NotImplementedError

    def quantizer(self, bits: int, *, search: bool = True) -> Quantizer:
        """How weights become codes; with a ``search`` for scales where there is one."""
        raise NotImplementedError

    def tensors(self, name: str, quantized: Any) -> Iterator[tuple[str, memoryview]]:
        """Names and bytes of what the weight ``name`` became."""
        raise NotImplementedError

    def read(self, tensors: Tensors, weight: Weight, device: str) -> StoredWeight:
        """A weight out of a checkpoint's tensors.

        Its ``dtype`` is only believed where the files do not say it themselves.

        Raises:
            Damaged: a part is missing, or has another dtype or shape than it should.
        """
        return self._read(tensors, weight, device, self.planned(weight))

    def _read(
        self,
        tensors: Tensors,
        weight: Weight,
        device: str,
        planned: Sequence[PlannedTensor],
        description: Mapping[str, Any] | None = None,
    ) -> StoredWeight:
        for each in planned:
            if each.name not in tensors:
                raise Damaged(f"there is no tensor {shown(each.name)}")
            info = tensors[each.name][1]
            if (info.dtype, info.shape) != (each.dtype, each.shape):
                raise Damaged(
                    f"{shown(each.name)} is {info.dtype} {list(info.shape)}, and a layer of shape "
                    f"{list(weight.shape)} needs {each.dtype} {list(each.shape)}"
                )
        parts = {each.name: load_tensor(*tensors[each.name]).to(device) for each in planned}
        return StoredWeight(weight, parts, description or {})

    def require_codes(self, stored: StoredWeight) -> None:  # noqa: B027 - most use all codes
        """Refuses codes that the weight's bits do not have, and other levels than the format's.

        Raises:
            Damaged: there are some.
        """

    def quantized(self, stored: StoredWeight) -> Any:
        """A stored weight in the form that the quantizer gives and takes."""
        raise NotImplementedError

    def runtime(self, stored: StoredWeight) -> Tensor:
        """Q (out × in) as the library dequantizes it that loads it, in the dtype of its products.

        It must be what the quantizer makes of :meth:`quantized`, to the bit.
        """
        raise NotImplementedError

    def held(self, layer: Any) -> Tensor:
        """Q (out × in) as a loaded layer of ``layer_class`` holds it.

        To be asked before the layer's first forward pass, after which codes may be in another
        order.
        """
        raise NotImplementedError
