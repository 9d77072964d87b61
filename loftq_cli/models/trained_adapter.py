"""A LoRA adapter as PEFT saves it, read tensor by tensor to be folded into weights.

Only what is LoRA on linear layers, and heads that were trained beside it, can be folded in exactly.
Of its config everything is refused that is set and not known here: a later PEFT may have options
that change what an adapter computes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.adapter import ADAPTER_CONFIG, PREFIX, lora_names
from loftq_cli.checkpoint.index import load_json
from loftq_cli.checkpoint.safetensors import Header, TensorInfo, read_header, shown
from loftq_cli.checkpoint.tensors import load_tensor
from loftq_cli.errors import CorruptCheckpoint, NonFiniteWeight, UnsupportedModel
from loftq_cli.formats import DTYPE_NAMES
from loftq_cli.models.adapters import adapter_weights
from loftq_cli.models.expert_parameters import adapter_modules, is_targeted

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.models.architecture import Architecture

_LORA = re.compile(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight")

# What says nothing about the product that an adapter adds, or is looked at here.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "target_modules", "target_parameters", "task_type", "use_rslora",
}  # fmt: skip
# With any other start PEFT changes the weights of the base too, in the training's memory only.
_STARTS: tuple[object, ...] = (True, False, "gaussian", "eva", "orthogonal")
_WHY_NOT = {
    "use_dora": "DoRA also scales the columns of the sum, by what was trained",
    "lora_bias": "it has a bias beside B, which needs a place in the layer",
    "bias": "the biases of the base were trained with it",
    "trainable_token_indices": "it has embeddings of single tokens",
}


@dataclass(frozen=True)
class Pair:
    """A and B of a module, and the factor s of their product."""

    A: TensorInfo
    B: TensorInfo
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True)
class ExpertPair(Pair):
    """A and B of all of so many ``experts`` (see `engines.expert_stacks`), for a matrix of one.

    The matrix is those ``rows`` (from, to) of what the model holds as one.
    """

    expert: int
    experts: int
    rows: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        first, end = self.rows
        return end - first, self.A.shape[1]

    def of_one(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Of all A and B those of this matrix."""
        first, end = self.rows
        own = B.view(len(B), -1, self.experts)[first:end, :, self.expert]
        return A.view(self.experts, -1, A.shape[1])[self.expert], own


@dataclass(frozen=True)
class TrainedAdapter:
    """The adapter in ``directory``: ``pairs`` by module, ``heads`` by parameter of the model.

    ``stacks`` are A and B that PEFT has on parameters, by where it has them: of experts, which
    `with_experts` tells from each other. Heads are whatever was trained in place of the model's
    own. (`modules_to_save` need not name them: PEFT adds those of its task types by itself.)
    """

    directory: Path
    config: Mapping[str, Any]
    header: Header
    pairs: Mapping[str, Pair]
    heads: Mapping[str, TensorInfo]
    stacks: Mapping[str, tuple[TensorInfo, TensorInfo]] = field(default_factory=dict)

    @property
    def experts(self) -> list[str]:
        """Those of the modules that are matrices of experts."""
        return [name for name, pair in self.pairs.items() if isinstance(pair, ExpertPair)]

    def factors(self, module: str) -> tuple[Tensor, Tensor, float]:
        """A (r, in) and B (out, r) in float32, and the scaling of their product."""
        pair = self.pairs[module]
        A, B = (load_tensor(self.header, info).float() for info in (pair.A, pair.B))
        if isinstance(pair, ExpertPair):
            A, B = pair.of_one(A, B)
        return A, B, pair.scaling

    def folded_into(self, Q: Tensor, module: str) -> Tensor:
        """Q + s·B·A (out, in) in float32; Q as it is, where the adapter has nothing.

        Raises:
            NonFiniteWeight: the sum is no number.
        """
        if module not in self.pairs:
            return Q
        A, B, scaling = self.factors(module)
        merged = Q.float().addmm(B, A, alpha=scaling)
        if not bool(merged.isfinite().all()):
            raise NonFiniteWeight(
                f"the adapter in {self.directory} has no numbers at {module}",
                cause="there is NaN or infinity among them, or they are too large",
                hint="the training diverged: take an earlier checkpoint of it",
            )
        return merged


def read_trained(directory: Path) -> TrainedAdapter:
    """Config and header of an adapter; none of its weights is read.

    Raises:
        ModelNotFound, UnsafeCheckpoint: there is none, or a pickle.
        UnsupportedModel: it cannot be folded into weights, for the reason given.
        CorruptCheckpoint: it contradicts itself.
    """
    header = read_header(adapter_weights(directory))
    config = load_json(directory / ADAPTER_CONFIG)
    _require_plain_lora(directory, config)
    heads = {}
    modules: dict[str, None] = {}
    for name, info in header.tensors.items():
        if found := _LORA.fullmatch(name):
            modules[found[1]] = None
        elif name.startswith(PREFIX) and ".lora_" not in name:
            heads[name.removeprefix(PREFIX)] = info
        else:
            raise cannot_merge(
                directory, f"{shown(name)} in it is neither A or B of a layer nor a trained head"
            )
    if not modules:
        raise _damaged(directory, "it has no pair of A and B")
    targets = _target_parameters(directory, config)
    on_parameters = {module for module in modules if _is_owner(module, targets)}
    stacks = {module: _factors(directory, header, module) for module in on_parameters}
    pairs = {
        module: _pair(directory, config, header, module)
        for module in modules
        if module not in on_parameters
    }
    return TrainedAdapter(directory, config, header, pairs, heads, stacks)


def _target_parameters(directory: Path, config: Mapping[str, Any]) -> list[str]:
    targets = config.get("target_parameters") or []
    if not (isinstance(targets, list) and all(isinstance(each, str) for each in targets)):
        raise _damaged(directory, f"its target_parameters are {targets!r:.60}")
    return targets


def _is_owner(module: str, target_parameters: Sequence[str]) -> bool:
    """Whether PEFT would have A and B of one of these parameters at this module."""
    path = re.sub(r"(\.base_layer)+$", "", module)
    return is_targeted(path, [each.rpartition(".")[0] for each in target_parameters])


def with_experts(
    adapter: TrainedAdapter, architecture: Architecture, tensors: Iterable[str]
) -> TrainedAdapter:
    """The same with a pair for each matrix of an expert among the ``tensors`` of a model.

    Raises:
        UnsupportedModel: it has A and B of other parameters.
        CorruptCheckpoint: A and B do not have the rank of its config.
    """
    directory, config = adapter.directory, adapter.config
    targets = _target_parameters(directory, config)
    if not targets:
        return adapter
    parameters = architecture.parameters_of(
        tensor for tensor in tensors if architecture.stacks.ruled_place(tensor) is not None
    )
    targeted = {each for each in parameters.values() if is_targeted(each, targets)}
    modules = {
        parameter: module.removeprefix(PREFIX)
        for parameter, module in adapter_modules(architecture.model, targeted).items()
    }
    if not modules or adapter.stacks.keys() != set(modules.values()):
        raise cannot_merge(
            directory,
            f"its target_parameters are {targets!r:.100}, and it has A and B for other experts "
            "than those that are quantized here",
            hint="into weights in 16 bits PEFT itself merges them: merge_and_unload()",
        )
    pairs: dict[str, Pair] = dict(adapter.pairs)
    for tensor, parameter in parameters.items():
        if parameter not in modules:
            continue
        A, B = adapter.stacks[modules[parameter]]
        experts, rows, columns = architecture.model.get_parameter(parameter).shape
        rank, alpha = _of_config(directory, config, parameter)
        if (A.shape, B.shape) != ((rank * experts, columns), (rows, rank * experts)):
            raise _damaged(
                directory,
                f"A and B of {shown(parameter)} are {list(A.shape)} and {list(B.shape)}, which "
                f"is not rank {rank} for {experts} experts",
            )
        module = tensor.removesuffix(".weight")
        place = architecture.stacks.ruled_place(tensor)
        assert place is not None
        height = rows // place.parts
        own = (place.part * height, (place.part + 1) * height)
        pairs[module] = ExpertPair(A, B, _scaling(config, rank, alpha), place.expert, experts, own)
    return replace(adapter, pairs=pairs)


def missing_modules(adapter: TrainedAdapter, modules: Iterable[str]) -> list[str]:
    """Those of the model's linear ``modules`` that the config puts A and B on, and have none."""
    from peft import PeftConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    try:
        config = PeftConfig.from_pretrained(adapter.directory)
        return [
            module
            for module in modules
            if module not in adapter.pairs and check_target_module_exists(config, module)
        ]
    except (TypeError, ValueError, re.error) as error:
        raise _damaged(adapter.directory, " ".join(str(error).split())) from error


def likeness(adapter: TrainedAdapter, start: TrainedAdapter) -> float:
    """The mean cosine between the A of both, over the modules where they have the same shape.

    It stays far from 0 while a start is trained, and is within a hundredth of it for two that were
    begun apart. 1 where no module can be compared.
    """
    cosines = [
        _cosine(adapter.factors(module)[0], start.factors(module)[0])
        for module, pair in adapter.pairs.items()
        if module in start.pairs and pair.A.shape == start.pairs[module].A.shape
    ]
    return sum(cosines) / len(cosines) if cosines else 1.0


def cannot_merge(directory: Path, cause: str, hint: str | None = None) -> UnsupportedModel:
    return UnsupportedModel(f"the adapter in {directory} cannot be merged", cause=cause, hint=hint)


def _cosine(one: Tensor, other: Tensor) -> float:
    scale = float(one.norm() * other.norm())
    return float((one * other).sum()) / scale if scale else 0.0


def _require_plain_lora(directory: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise cannot_merge(directory, f"it is {kind!r:.40}, and LoRA is what can be folded in")
    for key, value in config.items():
        if value and value != "none" and key not in _KNOWN:
            why = _WHY_NOT.get(key, "loftq does not know what that changes")
            raise cannot_merge(directory, f"its {key} is {value!r:.60}: {why}")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise cannot_merge(
            directory,
            f"its init_lora_weights is {start!r:.40}: PEFT changed the weights of the base in "
            "memory when the training began, and they are not those stored here",
            hint="save it with path_initial_model_for_weight_conversion, which makes it plain LoRA",
        )


def _pair(directory: Path, config: Mapping[str, Any], header: Header, module: str) -> Pair:
    A, B = _factors(directory, header, module)
    rank, alpha = _of_config(directory, config, module)
    if not (A.shape[0] == B.shape[1] == rank >= 1):
        raise _damaged(
            directory,
            f"A and B of {shown(module)} have ranks {A.shape[0]} and {B.shape[1]}, and by its "
            f"config it is {rank}",
        )
    return Pair(A, B, _scaling(config, rank, alpha))


def _factors(directory: Path, header: Header, module: str) -> tuple[TensorInfo, TensorInfo]:
    A, B = (header.tensors.get(name) for name in lora_names(module))
    if A is None or B is None:
        raise _damaged(directory, f"{shown(module)} has only one of A and B")
    if any(len(info.shape) != 2 or info.dtype not in DTYPE_NAMES for info in (A, B)):
        raise cannot_merge(directory, f"A and B of {shown(module)} are no matrices of numbers")
    return A, B


def _of_config(directory: Path, config: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Rank and lora_alpha of a module or a parameter."""
    return (
        _of_pattern(directory, config, "rank_pattern", "r", name),
        _of_pattern(directory, config, "alpha_pattern", "lora_alpha", name),
    )


def _scaling(config: Mapping[str, Any], rank: float, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(
    directory: Path, config: Mapping[str, Any], pattern: str, default: str, module: str
) -> float:
    """What the config says of a module, by PEFT's own rule."""
    from peft.utils.other import get_pattern_key

    patterns = config.get(pattern) or {}
    try:
        value = patterns.get(get_pattern_key(patterns.keys(), module), config.get(default))
    except (AttributeError, re.error):
        raise _damaged(directory, f"its {pattern} is {patterns!r:.60}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _damaged(directory, f"its {default} is {value!r:.40}")
    return value


def _damaged(directory: Path, cause: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"the adapter in {directory} is damaged",
        cause=cause,
        hint="save it again with `model.save_pretrained`",
    )
