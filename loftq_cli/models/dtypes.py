"""The dtypes in which a quantized model can run.

transformers casts a whole model when it loads it, but takes a quantized one as it is stored: a norm
in float32 among weights in bfloat16 gives the next layer something that it cannot multiply. So what
is not quantized is written in one dtype, as transformers would cast it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.errors import UnsupportedModel
from loftq_cli.formats import DTYPE_NAMES, FLOATS

if TYPE_CHECKING:
    from loftq_cli.models.architecture import Architecture


def stored_dtype(config: dict[str, Any]) -> str | None:
    """The dtype that config.json records, under its new or its old key."""
    value = config.get("dtype") or config.get("torch_dtype")
    return value if isinstance(value, str) else None


def require_numbers(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Refuses parameters in dtypes that mean nothing without the scales that belong to them.

    Raises:
        UnsupportedModel: there is one.
    """
    for tensor in sorted(architecture.float_parameters(checkpoint.tensors)):
        dtype = checkpoint.tensors[tensor][1].dtype
        if dtype not in FLOATS:
            raise UnsupportedModel(
                f"{tensor} is stored as {dtype}",
                cause=f"{architecture.class_name} computes with it, and no scales say what its "
                "codes mean",
                hint="give the checkpoint in 16 or 32 bits that it was made from",
            )


def runnable(
    checkpoint: Checkpoint, architecture: Architecture, quantized: Collection[str]
) -> Checkpoint:
    """The checkpoint with every parameter read in a dtype that the model runs in.

    That is the dtype which most of its bytes are in. What transformers keeps in float32 stays as it
    is, and so do the ``quantized`` weights; float64 becomes float32 there.
    """
    parameters = architecture.float_parameters(checkpoint.tensors)
    sizes: Counter[str] = Counter()
    for tensor in parameters:
        info = checkpoint.tensors[tensor][1]
        sizes[info.dtype] += info.nbytes
    main = max(DTYPE_NAMES, key=lambda dtype: sizes[dtype])
    tensors = dict(checkpoint.tensors)
    for tensor, parameter in parameters.items():
        header, info = tensors[tensor]
        wanted = main
        if tensor in quantized or architecture.keeps_in_float32(parameter):
            wanted = info.dtype if info.dtype in DTYPE_NAMES else "F32"
        if info.dtype != wanted:
            tensors[tensor] = header, replace(info, dtype=wanted, stored=info.stored or info.dtype)
    return replace(checkpoint, tensors=tensors)
