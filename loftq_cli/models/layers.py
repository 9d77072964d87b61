"""Which tensors of a checkpoint are linear layers, read from names and shapes alone.

No torch is needed, so `--dry-run` answers at once and for checkpoints of any size. Names follow
conventions, not rules: `architecture.py` asks the model class itself and has the last word
whenever weights are really written; a test holds the two against each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loftq_cli.checkpoint.safetensors import TensorInfo
from loftq_cli.containers.fused import expert_stack
from loftq_cli.formats import DEFAULT_BLOCK_SIZE, DTYPE_BITS, DTYPE_NAMES
from loftq_cli.models.stacking import Place, Stack, stack_by_names

# Why a tensor is left as it was. The report and `targets` print these words.
NOT_A_MATRIX = "not a matrix (norm, bias or convolution)"
NOT_FLOATING_POINT = "not float32, float16 or bfloat16"
EMBEDDING = "embedding"
OUTPUT_HEAD = "output head"
STACKED_EXPERTS = "stacked experts: nothing that loads this container takes them quantized"
UNRULED_EXPERTS = (
    "stacked experts: transformers has no rule that stacks quantized ones again "
    "(--experts quantize writes them one by one, for loftq and some servers)"
)
UNEVEN_EXPERTS = "an expert, of a block where a matrix of one cannot be quantized"
EXPERT = "an expert: adapters are for the layers that every token passes"
ROUTER = "expert router"
KEPT_IN_FLOAT32 = "kept in float32 by transformers"
SUBCLASSED_LINEAR = "a subclass of nn.Linear, which transformers does not replace"
MOVED = "PEFT moves adapters of this name onto the stacked experts"
READ_DIRECTLY = "its model reads the weight itself, past the layer"
AWKWARD_SHAPE = "a shape that bitsandbytes' kernels do not take on every device"

# bitsandbytes' CPU kernels (`_convert_weight_packed_for_cpu`) want whole groups of rows and, in
# each row, whole blocks; a layer that does not have them would load and then fail to run.
ROW_GROUP = 32

# `X.weight` with one of these as the last part of X is a lookup table, not a product.
_EMBEDDING = re.compile(
    r"(^|_)embed(ding)?s?($|_(?!hidden_mapping_in$|transformation$))|^(wte|wpe|shared|relative_attention_bias)$"
    r"|^(embed_in|tokens_embed|positions_embed)$"
)
# What transformers calls heads, from the model down.
HEADS = (
    "classification_head", "classifier", "ctc_head", "embed_out", "logits_proj",
    "output_projection", "pre_classifier", "proj_out", "qa_classifier", "qa_outputs", "score",
)  # fmt: skip
# Of heads for tokens only what scores them, which is where model classes end.
_HEAD = re.compile(
    rf"^({'|'.join(HEADS)}|lm_heads)(\.|$)|(^|\.)lm_head$|^head$"
    r"|^(cls|lm_head|predictions|generator_predictions)\.(.*\.)?(decoder|seq_relationship)$"
)
_EXPERT = re.compile(r"\.experts\.\d+\.[^.]+$")
# transformers' Conv1D stores its weight as (in, out).
_CONV1D_MODEL_TYPES = {"gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}
# Linear layers whose weight the model's code reads itself, by model type and the end of their path.
_MAMBA = ("mixer.x_proj", "mixer.dt_proj", "mixer.out_proj")
_READ_DIRECTLY = {
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "deberta": ("attention.self.in_proj",),
    "jamba": ("mamba.dt_proj",),
    "rwkv": ("attention.output", "feed_forward.value"),
    "switch_transformers": (".wo",),
    "wavlm": tuple(f"attention.{name}_proj" for name in ("q", "k", "v", "out")),
    **dict.fromkeys(("mamba2", "nemotron_h"), ("mixer.out_proj",)),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "zamba2"), ("mamba.out_proj",)),
}
# Model types for which PEFT (`_convert_peft_config_moe`) takes adapters of these names for such as
# were trained on experts one by one, and puts them on the stack of all.
_MOVED_BY_PEFT = ("gate_proj", "up_proj", "down_proj")
_EXPERTS_LIKE_QWEN2 = {
    "Dots3NoteTextModel", "UnlimitedOcrTextModel", "afmoe", "beam", "cohere2_moe",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
    "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe",
    "qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open",
}  # fmt: skip
# `_keep_in_fp32_modules` of the model classes, and linear layers of a class of their own.
_KEPT_IN_FLOAT32 = {"t5": {"wo"}, "mt5": {"wo"}, "umt5": {"wo"}, "longt5": {"wo"}}
_SUBCLASSED = {"falcon"}


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer whose weight the container can hold.

    ``transposed`` says that the checkpoint stores (in, out), as Conv1D does. An ``expert`` is one
    of many that a model holds as one: no layer of its own, so ``module`` is its name in the files.
    Where the checkpoint has those as one too, it is at its ``place`` there, and ``tensor`` is what
    it is called by itself.
    """

    module: str
    tensor: str
    out_features: int
    in_features: int
    transposed: bool
    dtype: str
    expert: bool = False
    place: Place | None = None

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features

    @property
    def source(self) -> str:
        """The tensor of the checkpoint that it is read from."""
        return self.tensor if self.place is None else self.place.tensor

    @property
    def turned(self) -> int:
        """How many times its size is read and turned: an expert's gate and up lie together."""
        if self.place is None:
            return int(self.transposed)
        return self.place.parts if self.place.stack.transposed else 0

    @property
    def stored_shape(self) -> tuple[int, int]:
        """As the checkpoint has it."""
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.transposed else shape

    def fits(self, block_size: int) -> bool:
        """Whether 4-bit kernels take the layer with this block size."""
        return self.out_features % ROW_GROUP == 0 and self.in_features % block_size == 0


@dataclass(frozen=True)
class LeftTensor:
    """A tensor that stays as it was, and why; one of experts that can be taken apart says how."""

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    reason: str
    stack: Stack | None = None

    def layers(self) -> Iterator[LinearLayer]:
        """The matrices of its experts as layers, where it has such."""
        if (stack := self.stack) is None:
            return
        experts, rows, columns = self.shape
        if stack.transposed:
            rows, columns = columns, rows
        count = experts * len(stack.parts)
        for index in range(count):
            module = stack.module(index)
            yield LinearLayer(
                module,
                f"{module}.weight",
                rows // len(stack.parts),
                columns,
                transposed=False,
                dtype=self.dtype,
                expert=True,
                place=Place(self.tensor, index, count, stack),
            )


@dataclass(frozen=True)
class Inventory:
    """Every tensor of a checkpoint, in its order: a linear layer's weight or left as it was.

    ``unadapted`` are modules among the layers that can have no adapter, with the reason.
    """

    entries: tuple[LinearLayer | LeftTensor, ...]
    unadapted: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> list[LinearLayer]:
        return [entry for entry in self.entries if isinstance(entry, LinearLayer)]

    @property
    def left(self) -> list[LeftTensor]:
        return [entry for entry in self.entries if isinstance(entry, LeftTensor)]

    def why_unadapted(self, layer: LinearLayer) -> str:
        """Why a layer can have no adapter; empty where it can."""
        return EXPERT if layer.expert else self.unadapted.get(layer.module, "")

    def adaptable(self) -> Inventory:
        """The same with every layer that can have no adapter as one of those that are left."""
        return Inventory(
            tuple(
                leave_layer(entry, reason)
                if isinstance(entry, LinearLayer) and (reason := self.why_unadapted(entry))
                else entry
                for entry in self.entries
            )
        )

    def keeping_experts(self, reason: str) -> Inventory:
        """The same with every expert that has a tensor of its own as one of those that are left."""
        stay = [entry for entry in self.layers if entry.expert and entry.place is None]
        return self._leaving(dict.fromkeys(stay, reason))

    def apart(self, why_it_stays: Callable[[Stack], str | None]) -> Inventory:
        """The same with stacks of experts as layers, a matrix each, unless one has to stay.

        ``why_it_stays`` is asked for the reason. Of a block all stay, or none: readers hold them as
        one.
        """
        uneven = {
            left.stack.path
            for left in self.left
            if left.stack and not next(left.layers()).fits(DEFAULT_BLOCK_SIZE)
        }
        entries: list[LinearLayer | LeftTensor] = []
        for entry in self.entries:
            stack = entry.stack if isinstance(entry, LeftTensor) else None
            if stack is None or not isinstance(entry, LeftTensor):
                entries.append(entry)
                continue
            reason = UNEVEN_EXPERTS if stack.path in uneven else why_it_stays(stack)
            entries += entry.layers() if reason is None else [replace(entry, reason=reason)]
        return replace(self, entries=tuple(entries))

    def evened(self) -> Inventory:
        """The same with all experts of a block left where one is: readers hold them as one."""
        left = {expert_stack(each.tensor.removesuffix(".weight")) for each in self.left} - {None}
        uneven = [each for each in self.layers if each.expert and expert_stack(each.module) in left]
        return self._leaving(dict.fromkeys(uneven, UNEVEN_EXPERTS))

    def _leaving(self, reasons: Mapping[LinearLayer, str]) -> Inventory:
        if not reasons:
            return self
        entries = (
            leave_layer(entry, reasons[entry])
            if isinstance(entry, LinearLayer) and entry in reasons
            else entry
            for entry in self.entries
        )
        return replace(self, entries=tuple(entries))


def linear_layers(tensors: Iterable[TensorInfo], config: dict[str, Any]) -> Inventory:
    """Sorts a checkpoint's tensors by their names and shapes, and ``config``'s model type."""
    # Weights in float64 are read in float32 (see `dtypes.runnable`).
    tensors = [replace(each, dtype="F32") if each.dtype == "F64" else each for each in tensors]
    model_type = str(config.get("model_type", ""))
    names = {info.name for info in tensors}
    vocabulary = config.get("vocab_size")
    entries: list[LinearLayer | LeftTensor] = []
    for info in tensors:
        module = info.name.removesuffix(".weight")
        transposed = model_type in _CONV1D_MODEL_TYPES and last_part(module) in _CONV1D_NAMES
        expert = _EXPERT.search(module) is not None
        reason = _reason_to_leave(info, model_type, names)
        if reason is None and block_of(module) is None and info.shape[0] == vocabulary:
            reason = EMBEDDING  # by another name
        entries.append(entry(info, module, transposed, reason, expert=expert))
    types = (model_type, str((config.get("text_config") or {}).get("model_type", "")))
    return unadapted_by_names(Inventory(with_stacks(entries, types)).evened(), model_type)


def with_stacks(
    entries: Iterable[LinearLayer | LeftTensor], model_types: Collection[str]
) -> tuple[LinearLayer | LeftTensor, ...]:
    """The same with how stacks of experts are taken apart, by names and shapes."""
    entries = tuple(entries)
    left = [each for each in entries if isinstance(each, LeftTensor) and ".experts." in each.tensor]
    shapes = {each.tensor: each.shape for each in left if each.dtype in DTYPE_NAMES}
    return tuple(
        replace(each, stack=stack_by_names(each.tensor, shapes, model_types))
        if isinstance(each, LeftTensor) and each.tensor in shapes
        else each
        for each in entries
    )


def unadapted_by_names(inventory: Inventory, model_type: str) -> Inventory:
    """The same with the layers that PEFT finds no place for in models of this type."""
    moved = _MOVED_BY_PEFT if model_type in _EXPERTS_LIKE_QWEN2 else ()
    modules = [layer.module for layer in inventory.layers if last_part(layer.module) in moved]
    return replace(inventory, unadapted=dict.fromkeys(modules, MOVED))


def is_read_directly(module: str, model_type: str) -> bool:
    """Whether the code of such models reads the layer's weight itself, by names."""
    return module.endswith(_READ_DIRECTLY.get(model_type, ()))


def entry(
    info: TensorInfo, module: str, transposed: bool, reason: str | None, *, expert: bool = False
) -> LinearLayer | LeftTensor:
    """A linear layer, unless there is a ``reason`` or the default block size does not fit it."""
    if reason is not None:
        return leave(info, reason)
    rows, columns = info.shape
    out_features, in_features = (columns, rows) if transposed else (rows, columns)
    layer = LinearLayer(
        module, info.name, out_features, in_features, transposed, info.dtype, expert
    )
    return layer if layer.fits(DEFAULT_BLOCK_SIZE) else leave(info, AWKWARD_SHAPE)


def leave(info: TensorInfo, reason: str) -> LeftTensor:
    return LeftTensor(info.name, info.shape, info.dtype, info.nbytes, reason)


def leave_layer(layer: LinearLayer, reason: str) -> LeftTensor:
    """A layer's weight that stays as it was, though it could be quantized."""
    nbytes = layer.parameters * DTYPE_BITS[layer.dtype] // 8
    return LeftTensor(layer.tensor, layer.stored_shape, layer.dtype, nbytes, reason)


def last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _reason_to_leave(info: TensorInfo, model_type: str, names: set[str]) -> str | None:
    module = info.name.removesuffix(".weight")
    parent = module.rpartition(".")[0]
    if info.dtype not in DTYPE_NAMES:
        return NOT_FLOATING_POINT
    if len(info.shape) == 3 and ".experts." in info.name:
        return STACKED_EXPERTS
    if len(info.shape) != 2 or 0 in info.shape or module == info.name:
        return NOT_A_MATRIX
    if _EMBEDDING.search(last_part(module)):
        return OUTPUT_HEAD if last_part(module) == "embed_out" else EMBEDDING
    if _HEAD.search(module):
        return OUTPUT_HEAD
    if last_part(module) in ("gate", "router") and any(
        name.startswith(f"{parent}.experts.") for name in names
    ):
        return ROUTER
    if is_read_directly(module, model_type):
        return READ_DIRECTLY
    if last_part(module) in _KEPT_IN_FLOAT32.get(model_type, ()):
        return KEPT_IN_FLOAT32
    if model_type in _SUBCLASSED or f"{parent}.in_proj_weight" in names:  # torch's attention
        return SUBCLASSED_LINEAR
    return None


def block_of(name: str) -> str | None:
    """The path of the decoder block that a tensor or module is in, up to its number.

    That is the first number in the path; None for what is in no block.
    """
    parts = name.split(".")
    end = next((place for place, part in enumerate(parts, start=1) if part.isdecimal()), None)
    return None if end is None else ".".join(parts[:end])
