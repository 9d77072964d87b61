"""Facts that code with torch and code without it both need, each of them once."""

from __future__ import annotations

from typing import Literal, TypeAlias

# Bits of a value, by safetensors' name of its dtype. In the order of the crate's `Dtype`, which is
# the order its writer sorts by: ascending alignment.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
# The dtypes of weights that can be quantized: safetensors' names and torch's.
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHORT_NAMES = {name: short for short, name in DTYPE_NAMES.items()}
# The dtypes of plain numbers. (Those of 8 bits and fewer have scales beside them.)
FLOATS = (*DTYPE_NAMES, "F64")

DEFAULT_CONTAINER = "bitsandbytes"
QuantType: TypeAlias = Literal["nf4", "fp4"]
# bitsandbytes has kernels for these.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_BLOCK_SIZE = 64
# What the tensors of packed 4-bit codes may be called, the same bytes in each.
QuantStorage: TypeAlias = Literal["uint8", "bfloat16", "float16", "float32"]
DEFAULT_STORAGE: QuantStorage = "uint8"
# Levels that a code of nf4 may choose from, all of them in four bits of the file.
NF_BITS = (2, 3, 4)
# With double quantization so many absmax share a scale.
NESTED_BLOCK_SIZE = 256

# Widths and blocks that kernels for integers have, in training and in serving. A whole row is what
# the field calls a group size of -1.
INTEGER_BITS = (2, 3, 4, 8)
WHOLE_ROW = -1
INTEGER_BLOCK_SIZES = (32, 64, 128, WHOLE_ROW)

# Where tasks run.
EngineName: TypeAlias = Literal["local", "ray"]
# On whose activations layers are calibrated: the original model's, or those that the quantized
# layers before them leave.
CalibrationOrder: TypeAlias = Literal["sequential", "parallel"]
# What becomes of the matrices of experts, where a model has some.
Experts: TypeAlias = Literal["quantize", "keep"]
AdapterDtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
SvdMethod: TypeAlias = Literal["auto", "exact", "randomized"]
# Beyond these, float32 adapters lose the correction; nobody trains there.
SCALINGS = (1e-6, 1e6)
# The largest rank of a layer with --rank-budget, as a multiple of the one asked for: so many
# directions of every residual are looked at. No layer of the demo would take more.
MOST_RANKS = 4
# As a target module: every linear layer but the output head.
ALL_LINEAR = "all-linear"
# The same of the parameters that experts are held as.
ALL_EXPERTS = "experts"
