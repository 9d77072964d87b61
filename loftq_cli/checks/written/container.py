"""The quantized weights as their library opens them, and the config that tells it so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.safetensors import shown
from loftq_cli.checkpoint.tensors import load_tensor
from loftq_cli.checks.battery import Finding
from loftq_cli.checks.written.claims import ClaimedLayer
from loftq_cli.checks.written.directory import WRITE_AGAIN, Written, not_as_reported
from loftq_cli.containers.base import Weight
from loftq_cli.containers.fused import fused_groups
from loftq_cli.errors import CheckFailed
from loftq_cli.formats import DTYPE_NAMES
from loftq_cli.models.source import CONFIG_FILE
from loftq_cli.report.formats import blocks_of, number_of

if TYPE_CHECKING:
    from torch import Tensor

# With AVX512-BF16, bitsandbytes turns what is smaller than any normal bfloat16 into zero.
_SMALLEST_NORMAL = 2.0**-126


def container(written: Written) -> Finding:
    """Config, skip list, and every quantized layer of the report."""
    claims = written.claims
    if not claims.container.quantizes:
        return _unquantized(written)
    skipped = _quantization_config(written)
    _require_same_layers(written)
    _require_skipped(written, skipped)
    notes = _as_servers_hold_them(written, skipped) if claims.container.even_when_fused else []
    values = _each_layer(written, _quantized)
    return Finding(
        f"{len(claims.layers)} layers in {_form(written)}: {claims.container.name} and the "
        f"reference dequantize {values:,} weights to the same bits",
        {
            "layers": len(claims.layers),
            "values_compared": values,
            "modules_in_skip_list": len(skipped),
        },
        notes=notes,
    )


def _unquantized(written: Written) -> Finding:
    """No sign of a quantization, and every layer of the report with finite numbers."""
    if written.config.get("quantization_config") is not None:
        raise _wrong_config("it has a quantization_config, and by the report nothing is quantized")
    for module, tensor in written.weights.items():
        raise CheckFailed(
            f"{module} is stored quantized, and by the report it is not",
            cause=f"there are scales for {shown(tensor)}",
            hint=WRITE_AGAIN,
        )
    count, values = len(written.claims.layers), _each_layer(written, _plain)
    return Finding(
        f"{count} layers are stored as they were, {values:,} finite weights; "
        "nothing is quantized, and the config says nothing else",
        {"layers": count, "values": values},
    )


def _each_layer(written: Written, look: Callable[[Written, ClaimedLayer], None]) -> int:
    """Looks at every layer of the report; gives the number of their weights."""
    for layer in written.claims.layers:
        written.progress.start(layer.name)
        look(written, layer)
        written.progress.advance(layer.name)
    return sum(layer.shape[0] * layer.shape[1] for layer in written.claims.layers)


def _form(written: Written) -> str:
    container = written.claims.container
    counts = Counter(layer.bits for layer in written.claims.layers)
    fewer = [
        f"{counts[bits]} with the codes of {bits} bits"
        for bits in sorted(counts, reverse=True)
        if bits < container.code_bits(bits)
    ]
    numbers = dict.fromkeys(number_of(container.quant_type, bits) for bits in sorted(counts))
    blocks = [] if container.block_size is None else [blocks_of(container.block_size)]
    return ", ".join(["/".join(numbers), *blocks, *fewer])


def _quantization_config(written: Written) -> list[str]:
    """The skip list, once everything else in `quantization_config` has been seen to be right."""
    container = written.claims.container
    config = written.config.get("quantization_config")
    if not isinstance(config, dict):
        raise _wrong_config("it has no quantization_config")
    skipped = config.get(container.skip_list)
    weights = [
        Weight(f"{layer.name}.weight", layer.name, layer.shape, layer.bits, dtype="")
        for layer in written.claims.quantized
    ]
    expected = container.quantization_config(weights, skipped or [], dtype=None)
    computed = container.quantization_config([], [], dtype="F32").keys() - expected.keys()
    for key in sorted(config.keys() - expected.keys()):
        if key not in computed or config[key] not in _computed_in(written):
            raise _wrong_config(f"{key} is {config[key]!r:.80}, which loftq does not write here")
    for key, value in expected.items():
        if key != container.skip_list and config.get(key) != value:
            raise _wrong_config(f"{key} is {config.get(key)!r:.80}, and by the report {value!r}")
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        # Without a list transformers makes one up, which misses heads that have a bias.
        raise _wrong_config(f"its {container.skip_list} is no list of names")
    return skipped


def _computed_in(written: Written) -> Collection[str]:
    """The dtypes that the layers may be computed in: that of all, where the report has it."""
    dtype = written.claims.settings.dtype
    return DTYPE_NAMES.values() if dtype is None else [dtype]


def _require_skipped(written: Written, skipped: list[str]) -> None:
    """Exactly the layers that have codes to load must be replaced."""
    quantized = {layer.name for layer in written.claims.layers} - written.experts
    container = written.claims.container
    skip_list = container.skip_list
    replaced = written.architecture.replaced_modules(
        skipped, whole_paths=container.skips_whole_paths
    )
    for module in sorted(replaced ^ quantized):
        if module in replaced:
            raise _wrong_config(
                f"{skip_list} lacks {module}, which has no codes: transformers would "
                "load its weight as if they were"
            )
        raise _wrong_config(f"{skip_list} leaves out {module}, which is quantized")


def _as_servers_hold_them(written: Written, skipped: list[str]) -> list[str]:
    """Layers that a server holds as one have one width there; what is then still refused.

    Raises:
        CheckFailed: they have several.
    """
    bits = {layer.name: layer.bits for layer in written.claims.layers}
    notes = []
    for group in fused_groups([*bits, *skipped]):
        found = {name: bits[name] for name in group if name in bits}
        told = ", ".join(f"{name} in {width}" for name, width in found.items())
        if len(set(found.values())) > 1:
            raise CheckFailed(
                f"{group[0]} and what a server holds with it have different bits",
                cause=f"{told}: vLLM refuses parts of one layer with several",
                hint=WRITE_AGAIN,
            )
        if found and len(found) < len(group):
            notes.append(
                f"vLLM refuses this directory: {', '.join(group)} are one layer there, and of "
                f"these only {', '.join(found)} is quantized"
            )
    return notes


def _require_same_layers(written: Written) -> None:
    claimed = {layer.name for layer in written.claims.layers}
    if not claimed:
        raise CheckFailed("the report names no quantized layer", hint=WRITE_AGAIN)
    for layer in written.claims.layers:
        written.weight_of(layer)
    for module in sorted(set(written.weights) - claimed):
        raise CheckFailed(
            f"{module} is stored quantized, and the report does not name it",
            cause=f"there are scales for {shown(written.weights[module])}",
            hint=WRITE_AGAIN,
        )


def _plain(written: Written, layer: ClaimedLayer) -> None:
    found = written.plain_layers.get(layer.name)
    if found is None:
        raise not_as_reported(layer, "no weight file has a weight of it")
    shape = (found.out_features, found.in_features)
    if shape != layer.shape:
        raise not_as_reported(
            layer, f"{shown(found.tensor)} is {list(shape)}, not {list(layer.shape)}"
        )
    if not bool(load_tensor(*written.checkpoint.tensors[found.tensor]).isfinite().all()):
        raise not_as_reported(layer, f"{shown(found.tensor)} has NaN or infinity")


def _quantized(written: Written, layer: ClaimedLayer) -> None:
    """What the library makes of the layer against what the reference does."""
    container = written.claims.container
    stored = written.stored(layer, every_code=True)
    expected = container.quantizer(layer.bits).dequantize(container.quantized(stored))
    if not bool(expected.isfinite().all()):
        raise CheckFailed(
            f"{layer.name} dequantizes to NaN or infinity",
            cause="a scale among its stored tensors is damaged",
            hint=WRITE_AGAIN,
        )
    found = container.runtime(stored)
    if tuple(found.shape) != layer.shape or found.dtype != expected.dtype:
        raise CheckFailed(
            f"{layer.name} is opened by {container.name} as {found.dtype} {list(found.shape)}",
            cause=f"it should be {expected.dtype} {list(layer.shape)}",
            hint=f"pip install -U {container.name}",
        )
    at = _first_difference(found, expected)
    if at is not None:
        row, column = divmod(at, layer.shape[1])
        raise CheckFailed(
            f"{layer.name} is dequantized by {container.name} to other values than the reference's",
            cause=f"in row {row}, column {column} it has {float(found[row, column]):.9g}, the "
            f"reference {float(expected[row, column]):.9g}",
            hint="`loftq check` tests the kernels of this box",
        )


def _first_difference(found: Tensor, expected: Tensor) -> int | None:
    import torch

    if torch.equal(found, expected):
        return None
    differs = (found != expected) & ~((found == 0) & (expected.abs() < _SMALLEST_NORMAL))
    return int(differs.view(-1).int().argmax()) if bool(differs.any()) else None


def _wrong_config(cause: str) -> CheckFailed:
    return CheckFailed(
        f"{CONFIG_FILE} does not describe what is stored", cause=cause, hint=WRITE_AGAIN
    )
