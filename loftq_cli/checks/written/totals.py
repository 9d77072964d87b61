"""The report's lists and totals, counted again from the files."""

from __future__ import annotations

import math

from loftq_cli.checkpoint.safetensors import shown
from loftq_cli.checks.battery import Finding
from loftq_cli.checks.written.claims import Claims
from loftq_cli.checks.written.directory import WRITE_AGAIN, Written
from loftq_cli.errors import CheckFailed

_ERRORS = (
    "weight_error_relative",
    "quantized_only_error_relative",
    "backbone_error_relative",
    "output_error_relative",
    "quantized_only_output_error_relative",
)


def totals(written: Written) -> Finding:
    """Every tensor of the files is in a list of the report, and the lists make up its totals."""
    claims = written.claims
    _require_listed(written)
    _require_shares(claims)
    found = {**_from_lists(claims), **_from_files(written)}
    for name, value in found.items():
        reported = getattr(claims.results.totals, name)
        if reported is None or not math.isclose(reported, value, rel_tol=1e-9):
            raise _wrong(f"total {name}", f"{reported}, and the files have {value}")
    _require_errors(claims)
    architecture = written.architecture.class_name
    if claims.results.architecture != architecture:
        raise _wrong(
            "architecture", f"{claims.results.architecture!r:.80}, and the config {architecture}"
        )
    return Finding(
        f"{len(written.checkpoint.tensors):,} tensors, each in a list of the report, with its "
        f"totals: {len(found)} counted again, and errors in between those of the layers",
        {"tensors": len(written.checkpoint.tensors), "totals": len(found)},
    )


def _require_listed(written: Written) -> None:
    """Each tensor is a layer's or was left as it was, and those that were left are there."""
    tensors = written.checkpoint.tensors
    left = {each.name: each for each in written.claims.results.untouched}
    for name, each in left.items():
        if name not in tensors:
            raise _wrong("list of untouched tensors", f"{shown(name)}, which no weight file has")
        shape = list(tensors[name][1].shape)
        if shape != each.shape:
            raise _wrong("list of untouched tensors", f"{shown(name)} {each.shape}: it is {shape}")
    layers = tuple(f"{name.removesuffix('.weight')}." for name in written.layer_tensors)
    for name in tensors:
        if name not in left and not name.startswith(layers):
            raise CheckFailed(
                f"{shown(name)} is in no list of the report",
                cause="it belongs to none of its layers, and is not among the untouched tensors",
                hint=WRITE_AGAIN,
            )


def _require_shares(claims: Claims) -> None:
    whole = claims.results.totals.input_bytes
    for each in (*claims.listed, *claims.results.untouched):
        if not math.isclose(each.share_of_bytes * whole, each.bytes, rel_tol=1e-9, abs_tol=1e-6):
            raise _wrong(
                f"share of {each.name}", f"{each.share_of_bytes:.6g}: {each.bytes} of {whole} bytes"
            )


def _from_lists(claims: Claims) -> dict[str, float]:
    """What the source had: its tensors are all in the lists."""
    listed = [*claims.listed, *claims.results.untouched]
    return {
        "input_bytes": sum(each.bytes for each in listed),
        "parameters": sum(math.prod(each.shape) for each in listed),
    }


def _from_files(written: Written) -> dict[str, float]:
    claims = written.claims
    tensors = {name: info for name, (_, info) in written.checkpoint.tensors.items()}
    left = {each.name for each in claims.results.untouched}
    header = written.adapter_header
    held = {} if header is None else header.tensors
    adapter = [info for name, info in held.items() if ".lora_" in name]
    in_layers = 8 * sum(info.nbytes for name, info in tensors.items() if name not in left)
    weights = sum(math.prod(layer.shape) for layer in claims.layers)
    spared = sum(
        (claims.container.code_bits(layer.bits) - layer.bits) * math.prod(layer.shape)
        for layer in claims.layers
    )
    found = {
        "output_bytes": sum(info.nbytes for info in tensors.values()),
        "adapter_bytes": sum(info.nbytes for info in adapter),
        "trainable_parameters": sum(info.elements for info in adapter),
        "stored_bits": in_layers / weights,
        "information_bits": (in_layers - spared) / weights,
    }
    # Before they were counted, a report had neither.
    known = claims.results.totals
    return {
        name: value
        for name, value in found.items()
        if not (name.endswith("_bits") and getattr(known, name) is None)
    }


def _require_errors(claims: Claims) -> None:
    """An error of all layers lies between the least and the largest of theirs."""
    for name in _ERRORS:
        total = getattr(claims.results.totals, name)
        # Without an adapter there is the backbone alone.
        each = [getattr(layer, name, layer.weight_error_relative) for layer in claims.listed]
        known = [error for error in each if error is not None]
        if min(known, default=0.0) < 0:
            raise _wrong(f"{name} of a layer", f"{min(known):.6g}")
        if not known and total is not None:
            raise _wrong(f"total {name}", f"{total:.6g}, and its layers have none")
        if len(known) < len(each) or not known:
            continue
        if total is None:
            if not all(hasattr(layer, name) for layer in claims.listed):
                continue
            raise _wrong(f"total {name}", "nothing, and its layers have one each")
        if not min(known) * (1 - 1e-9) <= total <= max(known) * (1 + 1e-9):
            raise _wrong(
                f"total {name}",
                f"{total:.6g}, and its layers have {min(known):.6g} to {max(known):.6g}",
            )


def _wrong(what: str, cause: str) -> CheckFailed:
    return CheckFailed(
        f"the report's {what} is not right",
        cause=f"it says {cause}: the report or the files were changed",
        hint=WRITE_AGAIN,
    )
