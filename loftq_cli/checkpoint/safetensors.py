"""Safetensors files: the header checked rule by rule, the tensors read by position.

The format (https://github.com/huggingface/safetensors, README "Format")::

    8 bytes           N, unsigned, little-endian
    N bytes           UTF-8 JSON object, padded with spaces:
                      {"__metadata__": {str: str}, NAME: {"dtype", "shape", "data_offsets"}, ...}
    the rest          the tensors; data_offsets count from here

A header comes from a stranger, so each rule of the reference crate (``safetensors/src/tensor.rs``,
0.8) is checked here too, without the crate and without torch: what this module accepts, the
loading libraries accept. It refuses a little more, on purpose:

* duplicate keys, and a header that does not begin with ``{``: the README forbids both, but the
  crate lets the last duplicate win, so two readers could see two different models;
* a tensor described by a list instead of an object, or a dtype by an object: an accident of the
  crate's deserializer that no writer uses;
* more than four million brackets and commas: nothing real comes near it, and a header of empty
  lists would take gigabytes once parsed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.files import (
    DOWNLOAD_AGAIN,
    ByteSource,
    LocalFile,
    Pieces,
    corrupt,
    opened,
    read_at,
)
from loftq_cli.formats import DTYPE_BITS

MAX_HEADER_BYTES = 100_000_000
MAX_JSON_MARKS = 4_000_000
MAX_JSON_DEPTH = 127
MAX_U64 = 2**64 - 1

# What else is found under a weight file's name. Read as a length, the first eight bytes of each
# are far above the cap, so no sound file begins like this.
_MISTAKEN = (
    (
        (b"version https://git-lfs",),
        "it is a git-lfs pointer, not the file itself",
        "run `git lfs pull` in the model's directory, or download it with `hf download`",
    ),
    (
        (b"<!doctype", b"<html", b"<head", b"<?xml"),
        "it is a web page, not weights",
        "the download was answered with an error or log-in page; download it with `hf download`",
    ),
    (
        (b"pk\x03\x04",),
        "it is a pickle archive as torch.save writes it, under the wrong name",
        "load it with the program that wrote it and save it as safetensors",
    ),
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: where its bytes lie in the file (``start`` to ``end``) and what they mean.

    ``dtype`` is what its values are read as, ``stored`` what they are in the file where that is
    another (see `index.Checkpoint.cast`).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    stored: str | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header; ``tensors`` is in file order, ``sha256`` is of the first header_bytes."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    header_bytes: int
    file_bytes: int
    sha256: str
    # Where the tensors are read; None if they are not to be had.
    source: ByteSource | None = None

    def opened(self) -> AbstractContextManager[Pieces]:
        """The bytes of the file (see `files.ByteSource`)."""
        assert self.source is not None, f"nothing is behind the header of {self.path}"
        return self.source.opened()


def shown(name: str) -> str:
    """A name from a file, fit for a message: escaped, and not ten kilobytes long."""
    return repr(name) if len(name) <= 100 else repr(name[:97]) + "..."


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this shape; ValueError where the crate sees an overflow or half a byte.

    The product is taken factor by factor because that is where the crate looks: a zero does not
    excuse an overflow that came before it.
    """
    size = 1
    for factor in (*shape, DTYPE_BITS[dtype]):
        size *= factor
        if size > MAX_U64:
            raise ValueError("its size overflows 64 bits")
    if size % 8:
        raise ValueError(f"{math.prod(shape)} values of {dtype} do not fill whole bytes")
    return size // 8


def header_length(head: bytes, file_bytes: int | None, name: str | Path) -> int:
    """Bytes before the first tensor, from the first eight bytes of the file (more is better)."""
    if len(head) < 8:
        reason = f"it is {len(head)} bytes long" if head else "it is empty"
        raise corrupt(name, reason, "the download broke off; " + DOWNLOAD_AGAIN)
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER_BYTES:
        for beginnings, reason, hint in _MISTAKEN:
            if head.lstrip().lower().startswith(beginnings):
                raise corrupt(name, reason, hint)
        raise corrupt(name, f"its header claims {length} bytes; {MAX_HEADER_BYTES} is the limit")
    if file_bytes is not None and 8 + length > file_bytes:
        raise corrupt(name, f"its header claims {length} bytes; the file has {file_bytes}")
    return 8 + length


def parse_header(
    raw: bytes,
    file_bytes: int | None,
    name: str | Path,
    source: ByteSource | None = None,
) -> Header:
    """Check a header that is in memory: `raw` begins with the file and holds all of the header.

    Without `file_bytes` (a range request that did not say) the file's length is taken on trust.
    """
    header_bytes = header_length(raw, file_bytes, name)
    if len(raw) < header_bytes:
        raise corrupt(name, f"its header has {len(raw)} bytes of {header_bytes}")
    header = raw[:header_bytes]
    try:
        if not header.startswith(b"{", 8):
            raise ValueError("its header does not begin with '{'")
        hooks = {"parse_int": _integer, "parse_float": _finite, "parse_constant": _finite}
        entries: dict[str, Any] = strict_json(header[8:], **hooks)
        metadata = _metadata(entries.pop("__metadata__", None))
        tensors = _tensors(entries, header_bytes)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise corrupt(name, reason) from None
    end = max((info.end for info in tensors.values()), default=header_bytes)
    if file_bytes is not None and end != file_bytes:
        problem = "is truncated" if end > file_bytes else "has trailing bytes"
        raise corrupt(name, f"it {problem}: {file_bytes} bytes long, and the header says {end}")
    digest = sha256(header).hexdigest()
    return Header(Path(name), tensors, metadata, header_bytes, end, digest, source)


def read_header(path: Path) -> Header:
    """Read and check the header of a local file."""
    with opened(path) as (fd, stamp):
        size, _ = stamp
        head = read_at(fd, bytearray(min(size, 64)), 0, path)
        length = header_length(bytes(head), size, path)
        raw = bytes(read_at(fd, bytearray(length), 0, path))
    return parse_header(raw, size, path, LocalFile(path, stamp))


def read_tensor(header: Header, info: TensorInfo) -> memoryview:
    """The bytes of a tensor, in memory of their own that can be written to."""
    tensor, filled = memoryview(bytearray(info.nbytes)), 0
    for piece in read_pieces(header, info):
        tensor[filled : filled + len(piece)] = piece
        filled += len(piece)
    return tensor


def read_pieces(header: Header, info: TensorInfo) -> Iterator[memoryview]:
    """The bytes of a tensor, a few megabytes at a time: a copy without holding all of it.

    Each piece is good until the next is asked for.
    """
    with header.opened() as pieces:
        yield from pieces(info.start, info.end)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` for json: a repeated key is an error, not a matter of who is last."""
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"the key {shown(key)} appears twice")
        entries[key] = value
    return entries


def strict_json(raw: bytes, **hooks: Any) -> Any:
    """JSON of bounded size; ValueError or RecursionError for anything else.

    A lone surrogate is refused (it cannot be printed or written again), and found by encoding the
    result, which only a text with an escape in it needs. `hooks` are those of ``json.loads``.
    """
    marks = sum(raw.count(mark) for mark in (b"[", b"{", b","))
    if marks > MAX_JSON_MARKS:
        raise ValueError(f"its JSON has more than {MAX_JSON_MARKS} values")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"its JSON is not UTF-8 at byte {error.start}") from None
    try:
        tree = json.loads(text, object_pairs_hook=_unique_keys, **hooks)
        if "\\u" in text:
            json.dumps(tree, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"its JSON is broken: {error}") from None
    except UnicodeEncodeError:
        raise ValueError("its JSON is broken: half of a surrogate pair") from None
    return tree


def _integer(digits: str) -> int | float:
    """As the crate's JSON parser has it: minus zero and what exceeds 64 bits are floats."""
    if digits == "-0" or len(digits) > 20:
        return _finite(digits)
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(digits)} is out of range")
    return value


def _metadata(entry: object) -> dict[str, str]:
    if entry is None:
        return {}
    if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
        raise ValueError("its __metadata__ is not a map from strings to strings")
    return entry


def _tensors(entries: dict[str, Any], data_start: int) -> dict[str, TensorInfo]:
    """The tensors in file order; each begins where the one before it ends."""
    tensors = [_tensor(name, entry) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    position = 0
    placed = {}
    for info in tensors:
        if info.start != position or info.end < info.start:
            found = f"bytes {info.start} to {info.end}, expected to begin at {position}"
            raise ValueError(f"tensor {shown(info.name)} leaves a gap or overlaps: {found}")
        position = info.end
        placed[info.name] = TensorInfo(
            info.name, info.dtype, info.shape, data_start + info.start, data_start + info.end
        )
    return placed


def _tensor(name: str, entry: object) -> TensorInfo:
    """One entry, its offsets still counted from the first tensor. Unknown fields are allowed."""
    try:
        if not isinstance(entry, dict):
            raise ValueError("it is not described by an object")
        missing = [field for field in ("dtype", "shape", "data_offsets") if field not in entry]
        if missing:
            raise ValueError(f"it has no {missing[0]}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str):
            raise ValueError("its dtype is not a string")
        if dtype not in DTYPE_BITS:
            raise ValueError(f"its dtype {shown(dtype)} is unknown")
        if not _naturals(shape):
            raise ValueError("its shape is not a list of whole numbers")
        if not _naturals(offsets) or len(offsets) != 2:
            raise ValueError("its data_offsets are not two whole numbers")
        if len(entry) > 3 and _depth(entry) > MAX_JSON_DEPTH - 1:
            raise ValueError("its entry is nested too deeply")
        start, end = offsets
        needed = tensor_bytes(dtype, tuple(shape))
        if start <= end and end - start != needed:
            raise ValueError(f"its shape and dtype need {needed} bytes, it has {end - start}")
    except ValueError as error:
        raise ValueError(f"tensor {shown(name)}: {error}") from None
    return TensorInfo(name, dtype, tuple(shape), start, end)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= MAX_U64 for n in value)


def _depth(value: object) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0
