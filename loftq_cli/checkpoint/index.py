"""A model directory: which files hold its weights, and which tensor is in which file.

The layouts are those that ``transformers`` loads, in its order: ``model.safetensors``, or several
files listed in ``model.safetensors.index.json`` (``{"weight_map": {TENSOR: FILE}}``). The index is
as untrusted as the weights, so a file in it has to be a bare name: transformers 5.23 follows
``../../etc/passwd``. Where a name leads is left alone, though, because in the hub's cache every
file is a link into ``../../blobs``.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.files import corrupt, read_file
from loftq_cli.checkpoint.safetensors import (
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    read_header,
    shown,
    strict_json,
)
from loftq_cli.errors import CorruptCheckpoint, ModelNotFound, UnsafeCheckpoint
from loftq_cli.formats import FLOATS, SHORT_NAMES

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 16_000_000
_BARE_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}\.safetensors")
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_CONVERT = (
    "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
    "source, out = sys.argv[1:]; M.from_pretrained(source, dtype='auto').save_pretrained(out); "
    "T.from_pretrained(source).save_pretrained(out)"
)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one model: ``headers`` by file name, ``tensors`` by tensor name."""

    directory: Path
    headers: dict[str, Header]
    tensors: dict[str, tuple[Header, TensorInfo]]

    @property
    def infos(self) -> list[TensorInfo]:
        return [info for _, info in self.tensors.values()]

    @property
    def total_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(header.file_bytes for header in self.headers.values())

    def cast(self, dtype: str | None) -> Checkpoint:
        """The same with every floating-point tensor read as ``dtype`` (torch's name of it).

        Without one the tensors are read as they are stored.
        """
        if dtype is None:
            return self
        tensors = {
            tensor: (header, cast_info(info, dtype))
            for tensor, (header, info) in self.tensors.items()
        }
        return replace(self, tensors=tensors)


def cast_info(info: TensorInfo, dtype: str) -> TensorInfo:
    """The tensor read as ``dtype`` (torch's name of it), if it is one of floating-point numbers."""
    name = SHORT_NAMES[dtype]
    if info.dtype not in FLOATS or info.dtype == name:
        return info
    return replace(info, dtype=name, stored=info.dtype)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read and check every header of the model in this directory; no tensor is read."""
    try:
        if not directory.is_dir():
            raise ModelNotFound(f"{directory} is not a directory")
        weight_map = None
        if (directory / SINGLE_FILE).is_file():
            files = [SINGLE_FILE]
        elif (directory / INDEX_FILE).is_file():
            weight_map = read_index(directory)
            files = sorted(set(weight_map.values()))
            _require_files(directory, files)
        else:
            files = [_only_file(directory)]
        headers = {file: read_header(directory / file) for file in files}
        return checkpoint_of(directory, headers, weight_map)
    except OSError as error:
        raise ModelNotFound(f"{directory} cannot be read", cause=error.strerror) from error


def load_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from a file of bounded size, without repeated keys.

    Infinity and NaN are let through: configs that transformers 4 wrote have them as bare words.
    """
    return parse_json(read_file(path, max_bytes), path)


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """The same from memory; ``path`` is for the messages."""
    try:
        tree = strict_json(raw)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise corrupt(path, reason) from None
    if not isinstance(tree, dict):
        raise corrupt(path, "its JSON is not an object")
    return tree


def read_index(directory: Path) -> dict[str, str]:
    """The file of each tensor, by the directory's index."""
    path = directory / INDEX_FILE
    return weight_map_of(load_json(path, MAX_HEADER_BYTES), path)


def weight_map_of(index: dict[str, Any], path: Path) -> dict[str, str]:
    """The checked map from tensors to bare file names; ``path`` is for the messages."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise corrupt(path, "it has no weight_map, or an empty one")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise corrupt(path, f"it gives no file for tensor {shown(name)}")
        if not _BARE_NAME.fullmatch(file):
            raise UnsafeCheckpoint(
                f"{path} puts tensor {shown(name)} into {shown(file)}",
                cause="a weight file must be a bare *.safetensors name in the model's directory",
                hint="do not use this checkpoint: an index like this reads other people's files",
            )
    return weight_map


def _require_files(directory: Path, names: list[str]) -> None:
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CorruptCheckpoint(
            f"{directory / missing[0]} is missing",
            cause=f"{len(missing)} of the {len(names)} files in {INDEX_FILE} are not there",
            hint="finish the download; `hf download` fetches what is missing",
        )


def checkpoint_of(
    directory: Path, headers: dict[str, Header], weight_map: dict[str, str] | None = None
) -> Checkpoint:
    """Puts a model's headers together, which must say the same as its index, if it has one."""
    tensors = {
        name: (header, info) for header in headers.values() for name, info in header.tensors.items()
    }
    if not tensors:
        raise corrupt(directory, "its weight files hold no tensor")
    if weight_map is not None:
        _require_agreement(directory, headers, weight_map)
    return Checkpoint(directory, headers, tensors)


def _require_agreement(
    directory: Path, headers: dict[str, Header], weight_map: dict[str, str]
) -> None:
    """A tensor in two files, or in none, is nobody's model."""
    held = {(name, file) for file, header in headers.items() for name in header.tensors}
    mapped = set(weight_map.items())
    for pairs, problem in (
        (mapped - held, "is not in the file that the index names"),
        (held - mapped, "is in a file that the index does not name for it"),
    ):
        if pairs:
            name, file = min(pairs)
            raise CorruptCheckpoint(
                f"{directory / INDEX_FILE} and the weight files contradict each other",
                cause=f"tensor {shown(name)} {problem}: {file} ({len(pairs)} such tensors)",
                hint="download the model again into an empty directory",
            )


def _only_file(directory: Path) -> str:
    """The one weight file with a name of its own; what else might be there decides the error."""
    found = sorted(file.name for file in directory.glob("*.safetensors"))
    weights = [name for name in found if name != ADAPTER_FILE]
    if len(weights) == 1:
        return weights[0]
    if weights:
        raise corrupt(
            directory,
            f"it has {len(weights)} weight files and no {INDEX_FILE} to say what belongs together",
            "download the index too, or leave only the file that is meant",
        )
    if found:
        raise ModelNotFound(
            f"{directory} holds an adapter without its model",
            cause=f"{ADAPTER_FILE} is the only weight file",
            hint="give the model that adapter_config.json names as base_model_name_or_path",
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    if pickles:
        source, out = shlex.quote(str(directory)), shlex.quote(f"{directory}-safetensors")
        raise UnsafeCheckpoint(
            f"{directory} has only pickle weights ({shown(pickles[0])})",
            cause="loading a pickle runs whatever code is in it",
            hint=f'if you trust it, convert it: python -c "{_CONVERT}" {source} {out}',
        )
    raise ModelNotFound(
        f"{directory} holds no model",
        cause=f"there is neither {SINGLE_FILE} nor {INDEX_FILE} in it",
        hint="give the directory that has config.json and the weights in it",
    )
