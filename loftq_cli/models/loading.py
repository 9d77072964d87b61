"""Loads a model as its users will: plain transformers, then PEFT for an adapter on top."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from loftq_cli.checkpoint.index import Checkpoint, open_checkpoint
from loftq_cli.errors import CorruptCheckpoint, UnsupportedModel, told_as
from loftq_cli.formats import DEFAULT_CONTAINER
from loftq_cli.libraries import import_bitsandbytes
from loftq_cli.models.adapters import (
    attach_adapter,
    attach_fresh,
    own_adapter,
    require_same_base,
)
from loftq_cli.models.architecture import Architecture, read_architecture
from loftq_cli.models.dequantized import IntegerCodes, integer_codes
from loftq_cli.models.packed_experts import (
    PackedExperts,
    packed_experts,
    require_no_adapter_on_experts,
)
from loftq_cli.models.source import CONFIG_FILE, quantization_method, read_config

Clock: TypeAlias = Callable[[str], AbstractContextManager[object]]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer if it has one, and what its adapter is called.

    ``codes`` are those of the files that plain weights were made of, if any were; ``experts`` are
    those that are packed in memory too.
    """

    model: Any
    tokenizer: Any
    adapter: str | None
    codes: IntegerCodes | None = None
    experts: PackedExperts | None = None

    @property
    def base(self) -> Any:
        """The model without PEFT's wrapping; the adapter stays inside."""
        return self.model if self.adapter is None else self.model.get_base_model()


def load_model(
    directory: Path,
    *,
    device: str,
    dtype: str,
    adapter: Path | None = None,
    fresh_rank: int | None = None,
    trainable: bool = False,
    trust_remote_code: bool = False,
    clock: Clock = nullcontext,
) -> LoadedModel:
    """Loads the directory's model and tokenizer, and puts an adapter on top.

    The adapter is ``adapter``'s, or a new one of rank ``fresh_rank``, or the one that lies in
    the directory's own `loftq_init/`, or none.

    Args:
        device: `cpu` or `cuda:N`; the whole model goes there.
        dtype: torch's name of the dtype to compute in, and of everything that is not quantized.
        trainable: whether an adapter from files is to be trained further.
        clock: told the time of `import`, `build` (the class without memory, the tokenizer)
            and `read` (weights and adapter into memory, on the device).

    Raises:
        CorruptCheckpoint: the files contradict each other or the model class.
        UnsafeCheckpoint, UnsupportedModel: see `read_architecture`.
    """
    config = read_config(directory)
    checkpoint = open_checkpoint(directory)  # its errors name the file; the libraries' often do not
    own = own_adapter(directory)
    if adapter is not None:
        require_same_base(adapter, directory)
    with clock("import"):
        import torch
        from transformers import modeling_utils  # noqa: F401

        if quantization_method(config) == DEFAULT_CONTAINER:
            import_bitsandbytes()
        if adapter or fresh_rank or own:
            import peft  # noqa: F401
        torch.empty(1, device=device)  # sets a GPU up, which is no part of reading
    with clock("build"):
        architecture = read_architecture(directory, config, trust_remote_code=trust_remote_code)
        codes = integer_codes(architecture, config, checkpoint)
        experts = packed_experts(architecture, checkpoint) if codes is None else None
        found = adapter or own
        if experts is not None and found is not None and fresh_rank is None:
            require_no_adapter_on_experts(found)
        tokenizer = load_tokenizer(directory, trust_remote_code)
    with clock("read"):
        place = {"device_map": {"": device}}
        if codes is not None:
            model = _read_dequantized(directory, architecture, dtype, codes, checkpoint, **place)
        else:
            model = read_weights(directory, architecture, dtype, experts, **place)
        if "quantization_config" in config and codes is None:
            _unify(model, getattr(torch, dtype))
            _compute_in(model, getattr(torch, dtype))
            keep_layout(model)
        if experts is not None:
            experts.put_into(model, device, dtype)
        name = None
        if adapter is not None:
            model, name = attach_adapter(model, adapter, trainable), str(adapter)
        elif fresh_rank is not None:
            model = attach_fresh(model, fresh_rank, architecture.task_type)
            name = f"new, rank {fresh_rank}"
        elif own is not None:
            model, name = attach_adapter(model, own, trainable), own.name
    return LoadedModel(model.eval(), tokenizer, name, codes, experts)


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> Any:
    """The directory's tokenizer; None where it has none.

    Raises:
        CorruptCheckpoint: its files are no tokenizer.
    """
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    with told_as(CorruptCheckpoint, f"the tokenizer in {directory} cannot be loaded"):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)


def read_weights(
    directory: Path,
    architecture: Architecture,
    dtype: str,
    experts: PackedExperts | None = None,
    **options: Any,
) -> Any:
    """The directory's model as transformers loads it; ``options`` are those of from_pretrained.

    With a `state_dict` among them the weights are those, and nothing is read from the directory.
    Stacks of ``experts`` are left out.

    Raises:
        CorruptCheckpoint: it cannot be loaded, or not all weights are there.
    """
    import torch

    model_class = type(architecture.model)
    read_class = model_class if experts is None else experts.without_stacks(model_class)
    with told_as(CorruptCheckpoint, f"{directory} cannot be loaded"):
        model, info = read_class.from_pretrained(
            None if "state_dict" in options else directory,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            **options,
        )
    # transformers fills in random numbers and goes on: a model that is not the one asked for.
    if missing := sorted(info["missing_keys"]):
        raise CorruptCheckpoint(
            f"{directory} lacks weights of {architecture.class_name}",
            cause=f"{len(missing)} not found in its files, the first of them {missing[0]}",
            hint="name the class that the weights belong to in config.json's architectures, or "
            "download the checkpoint again",
        )
    model.__class__ = model_class
    return model


def _read_dequantized(
    directory: Path,
    architecture: Architecture,
    dtype: str,
    codes: IntegerCodes,
    checkpoint: Checkpoint,
    **options: Any,
) -> Any:
    """The model of a directory of integer codes, as if its weights had been stored dequantized."""
    from transformers import GenerationConfig

    settings = copy.deepcopy(architecture.model.config)
    del settings.quantization_config
    try:
        generation = GenerationConfig.from_pretrained(directory)
    except OSError:  # then it is part of the model's config, as transformers sees it
        generation = GenerationConfig.from_pretrained(
            directory, config_file_name=CONFIG_FILE, _from_model_config=True
        )
    with codes.state_dict(checkpoint) as state:
        return read_weights(
            directory,
            architecture,
            dtype,
            config=settings,
            generation_config=generation,
            state_dict=state,
            **options,
        )


def keep_layout(model: Any) -> None:
    """Lets anything be done with a model after a forward pass, on every CPU.

    On a CPU with native bfloat16, bitsandbytes 0.50 rearranges 4-bit weights in place in the first
    forward pass outside of training, for a faster kernel. Nothing but that kernel reads them
    rightly from then on: training fails, and what is saved or gets an adapter is wrong in silence.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _unify(model: Any, dtype: Any) -> None:
    """Everything that is not quantized in ``dtype``.

    In a quantized checkpoint transformers 5.23 casts biases but leaves weights, of norms and
    embeddings too, in the dtype that they are stored in; the two do not multiply.
    """
    kept = {*(model._keep_in_fp32_modules or ())}
    for name, parameter in model.named_parameters():
        packed = hasattr(parameter, "quant_state")  # and numbers only in name, if at all
        if parameter.is_floating_point() and not packed and not kept.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def _compute_in(model: Any, dtype: Any) -> None:
    """Has 4-bit layers multiply in ``dtype``, whatever their config.json says.

    That of the files would round the inputs and outputs of every quantized layer, and on a CPU
    without native bfloat16 take a hundred times as long.
    """
    for module in model.modules():
        if hasattr(module, "compute_type_is_set"):
            module.compute_dtype = dtype


def require_text_model(loaded: LoadedModel) -> None:
    """Refuses models that cannot write text.

    Raises:
        UnsupportedModel: no tokenizer, or no language-model head.
    """
    if not loaded.base.can_generate():
        raise UnsupportedModel(
            f"{type(loaded.base).__name__} does not generate text",
            hint="choose a causal or sequence-to-sequence language model",
        )
    if loaded.tokenizer is None:
        raise UnsupportedModel("this model has no tokenizer", cause="there is no tokenizer.json")


def logical_parameters(model: Any) -> int:
    """Weights as the architecture counts them: a packed 4-bit weight has all its elements."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else state.shape.numel()
    return total


def placement(device: str, max_memory_bytes: int | None, share: float) -> dict[str, Any]:
    """For `read_weights`: where weights are, on the device, in memory or in their files.

    They may take this ``share`` of what is free on the device, and of ``max_memory_bytes``.
    Wherever they are, it is on ``device`` that transformers and accelerate compute with them.
    """
    if device == "cpu" and max_memory_bytes is None:
        return {"device_map": {"": "cpu"}}
    limits: dict[int | str, int] = {}
    if device != "cpu":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        limits[torch.device(device).index or 0] = int(free * share)
    in_memory = max_memory_bytes if max_memory_bytes is not None else 1 << 60
    limits["cpu"] = int(in_memory * share)
    return {"device_map": "auto", "max_memory": limits}
