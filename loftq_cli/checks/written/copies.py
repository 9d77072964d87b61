"""What was only copied, against the source: tensors, configuration, and the files beside them.

A report can be made to fit whatever was changed. The source cannot, and here is all of it that the
residuals do not measure.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.adapter import ADAPTER_DIRECTORY, PREFIX
from loftq_cli.checkpoint.index import INDEX_FILE, Checkpoint
from loftq_cli.checkpoint.safetensors import Header, TensorInfo, shown
from loftq_cli.checkpoint.tensors import load_pieces
from loftq_cli.checkpoint.writer import hash_file
from loftq_cli.checks.battery import Finding, NothingToCheck
from loftq_cli.checks.written.directory import WRITE_AGAIN, Written
from loftq_cli.checks.written.residuals import has_reported_files
from loftq_cli.engines.output import config_in_dtype
from loftq_cli.errors import CheckFailed
from loftq_cli.models.companions import companions
from loftq_cli.models.dtypes import runnable
from loftq_cli.models.source import CONFIG_FILE, README_FILE, read_config
from loftq_cli.models.spec import ResolvedModel

# Which version saved it, and under which name, says nothing about a model.
_NO_MATTER = {"transformers_version", "_name_or_path", "quantization_config"}
_DTYPES = {"dtype", "torch_dtype"}


def copies(written: Written, source: ResolvedModel | None) -> Finding:
    """Tensors, config and files are the source's, but for what quantizing adds."""
    if source is None:
        raise NothingToCheck("the source is not at hand")
    original = source.checkpoint()
    # The same weights in other files may have been saved by another version: names that only one
    # of the two has are no matter then.
    strict = has_reported_files(written, original) is not False
    original = original.cast(written.claims.settings.dtype)
    _require_config(written, source, strict)
    tensors = _require_tensors(written, source, original, strict)
    if strict:
        _require_sizes(written, source, original)
    files = _require_files(written, source) if strict else 0
    return Finding(
        f"{tensors} tensors and {files} files are those of {source.identity.id}, byte by byte, "
        "and so is the configuration, but for the quantization",
        {"tensors": tensors, "files": files},
    )


def _require_config(written: Written, source: ResolvedModel, strict: bool) -> None:
    dtype = written.claims.settings.dtype
    original = config_in_dtype(read_config(source.directory), dtype)
    ignored = _NO_MATTER if strict else _NO_MATTER | _DTYPES
    if written.claims.container.wants_dtype and not _DTYPES & original.keys():
        ignored = ignored | _DTYPES
    place = _difference(written.config, original, strict, ignored)
    if place is not None:
        raise CheckFailed(
            f"{CONFIG_FILE} is not the source's",
            cause=f"{place} is another than in {source.directory / CONFIG_FILE}",
            hint=WRITE_AGAIN,
        )


def _difference(one: Any, other: Any, strict: bool, ignored: set[str]) -> str | None:
    """The path of the first value that is not the same in both."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        # repr: NaN is not itself, and true is 1
        return None if repr(one) == repr(other) else ""
    keys = one.keys() | other.keys() if strict else one.keys() & other.keys()
    for key in sorted(keys - ignored):
        if (key in one) != (key in other):
            return str(key)
        below = _difference(one[key], other[key], strict, ignored)
        if below is not None:
            return f"{key}.{below}" if below else str(key)
    return None


def _require_tensors(
    written: Written, source: ResolvedModel, original: Checkpoint, strict: bool
) -> int:
    """All tensors that are no layer's; the number of those that were compared."""
    found = written.checkpoint.tensors
    layers = set(written.layer_tensors)  # the residuals are about them
    parts = tuple(f"{name.removesuffix('.weight')}." for name in layers)
    layers |= {each.source for each in written.originals(original).values() if each.place}
    if strict:
        for name in sorted(original.tensors.keys() - found.keys() - layers):
            raise _not_copied(name, "the source has it, and no weight file here", source)
        for name in sorted(found.keys() - original.tensors.keys()):
            if not name.startswith(parts):
                raise _not_copied(name, "the source has no such tensor", source)
    compared = {
        name: (found[name], name)
        for name in sorted(found.keys() & original.tensors.keys() - layers)
    }
    tensors_of = {
        f"{PREFIX}{parameter}": tensor
        for tensor, parameter in written.architecture.parameters_of(original.tensors).items()
    }
    if (adapter := written.adapter_header) is not None:
        for name, info in adapter.tensors.items():  # beside the adapter: heads that PEFT trains
            if ".lora_" not in name and name in tensors_of:
                compared[name] = (adapter, info), tensors_of[name]
    # What could not run as it is stored was converted; before that was done, it was not.
    stored, converted = original.tensors, original.tensors
    if written.claims.container.quantizes:
        converted = runnable(original, written.architecture, layers).tensors
    for name, (copy, tensor) in compared.items():
        header, info = converted[tensor]
        if copy[1].dtype == stored[tensor][1].dtype:
            header, info = stored[tensor]
        if (copy[1].dtype, copy[1].shape) != (info.dtype, info.shape):
            raise _not_copied(
                name,
                f"it is {copy[1].dtype} {list(copy[1].shape)}, and should be "
                f"{info.dtype} {list(info.shape)}",
                source,
            )
        if _digest(*copy) != _digest(header, info):
            raise _not_copied(name, "its bytes are others", source)
    return len(compared)


def _require_sizes(written: Written, source: ResolvedModel, original: Checkpoint) -> None:
    """What the report says of the source, which no file here can tell."""
    totals = written.claims.results.totals
    for name, reported, found in (
        ("input_bytes", totals.input_bytes, sum(info.nbytes for info in original.infos)),
        ("parameters", totals.parameters, sum(info.elements for info in original.infos)),
    ):
        if reported != found:
            raise CheckFailed(
                f"the report's total {name} is not right",
                cause=f"it says {reported}, and {source.identity.id} has {found}",
                hint=WRITE_AGAIN,
            )


def _digest(header: Header, info: TensorInfo) -> bytes:
    digest = sha256()
    for piece in load_pieces(header, info):
        digest.update(piece)
    return digest.digest()


def _not_copied(name: str, cause: str, source: ResolvedModel) -> CheckFailed:
    return CheckFailed(
        f"{shown(name)} is not the source's",
        cause=f"{cause}; {source.identity.id} is what was quantized",
        hint=WRITE_AGAIN,
    )


def _require_files(written: Written, source: ResolvedModel) -> int:
    """The files that were copied; the number of those that were compared."""
    ours = {CONFIG_FILE, INDEX_FILE, README_FILE, *written.checkpoint.headers}
    found = companions(source.directory, with_code=True)
    theirs = {each.name: each for each in found.files}
    listed = {each.name: each for each in written.claims.results.files}
    left_out = {each.name for each in written.claims.results.not_copied}
    from_hub = source.identity.source == "hub"  # whose cache may have been filled by others
    for each in found.tokenizer:
        if not from_hub and each.name not in listed.keys() | left_out:
            raise _not_copied(each.name, "the source has it, and no file here is it", source)
    compared = 0
    for name, claimed in listed.items():
        if name in ours or name.startswith(f"{ADAPTER_DIRECTORY}/"):
            continue
        if name in theirs:
            compared += 1
            path = theirs[name].path
            # The sizes first: a file that another has taken the place of may be of any.
            sizes = {claimed.bytes, _size(written.directory / name), theirs[name].bytes}
            if len(sizes) > 1 or (
                hash_file(written.directory / name).sha256 != hash_file(path).sha256
            ):
                raise _not_copied(name, f"{path} has other bytes", source)
        elif not from_hub:
            raise _not_copied(name, "the source has no such file to copy", source)
    return compared


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
