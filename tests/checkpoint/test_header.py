"""Our header reader against the reference library: the same files, the same verdict."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hostile_files import BROKEN, LEAST, SOUND, STRICTER
from safetensors import SafetensorError, deserialize, safe_open

from loftq_cli.checkpoint.safetensors import (
    DTYPE_BITS,
    Header,
    header_length,
    parse_header,
    read_header,
    read_tensor,
)
from loftq_cli.errors import CorruptCheckpoint


def reference_accepts(path: Path) -> bool:
    """Both entrances of the library, the one for bytes and the one for files, must agree."""
    try:
        deserialize(path.read_bytes())
        from_bytes = True
    except SafetensorError:
        from_bytes = False
    try:
        with safe_open(path, "numpy"):
            from_file = True
    except SafetensorError:
        from_file = False
    assert from_bytes == from_file
    return from_bytes


def refused(path: Path) -> CorruptCheckpoint:
    with pytest.raises(CorruptCheckpoint) as caught:
        read_header(path)
    return caught.value


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_the_corpus_is_large() -> None:
    assert len(BROKEN) >= 60


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_read_like_the_reference(name: str, model_file: Path) -> None:
    model_file.write_bytes(SOUND[name])
    assert reference_accepts(model_file)
    header = read_header(model_file)
    ours = {
        name: (info.dtype, list(info.shape), bytes(read_tensor(header, info)))
        for name, info in header.tensors.items()
    }
    theirs = {
        name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
        for name, tensor in deserialize(SOUND[name])
    }
    assert ours == theirs


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_by_both(name: str, model_file: Path) -> None:
    model_file.write_bytes(BROKEN[name])
    assert not reference_accepts(model_file)
    error = refused(model_file)
    assert str(model_file) in error.what
    assert error.cause
    assert error.hint


@pytest.mark.parametrize("name", STRICTER)
def test_where_we_are_stricter(name: str, model_file: Path) -> None:
    raw, argument = STRICTER[name]
    model_file.write_bytes(raw)
    assert reference_accepts(model_file)
    assert refused(model_file).cause
    assert argument


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("git-lfs pointer", "git lfs pull"),
        ("web page", "hf download"),
        ("torch archive", "save it as safetensors"),
        ("empty file", "broke off"),
        ("data cut short", "download the file again"),
    ],
)
def test_the_hint_knows_what_the_file_is(name: str, hint: str, model_file: Path) -> None:
    model_file.write_bytes(BROKEN[name])
    assert hint in (refused(model_file).hint or "")


def test_messages_stay_printable_and_short(model_file: Path) -> None:
    name = "\\u001b[31m" + "x" * 10_000
    model_file.write_bytes(BROKEN["overlap"].replace(b'"b"', f'"{name}"'.encode()))
    raw = model_file.read_bytes()
    model_file.write_bytes((len(raw) - 8 - 3).to_bytes(8, "little") + raw[8:])
    cause = refused(model_file).cause
    assert cause is not None
    assert cause.isprintable()
    assert len(cause) < 300


def test_header_by_range_request(model_file: Path) -> None:
    """What issue 3 does with a file on a server: length first, then the header alone."""
    model_file.write_bytes(LEAST)
    needed = header_length(LEAST[:8], len(LEAST), "model.safetensors")
    fetched = parse_header(LEAST[:needed], len(LEAST), "model.safetensors")
    local = read_header(model_file)
    assert (fetched.tensors, fetched.sha256) == (local.tensors, local.sha256)
    assert fetched.header_bytes == local.header_bytes == needed
    unknown_size = parse_header(LEAST[:needed], None, "model.safetensors")
    assert unknown_size.file_bytes == local.file_bytes
    with pytest.raises(CorruptCheckpoint):
        parse_header(LEAST[: needed - 1], len(LEAST), "model.safetensors")


def test_tensors_are_in_file_order(model_file: Path) -> None:
    model_file.write_bytes(SOUND["not in file order"])
    header: Header = read_header(model_file)
    assert list(header.tensors) == ["a", "b"]
    a, b = header.tensors.values()
    assert (a.start, a.end) == (header.header_bytes, b.start)
    assert b.end == header.file_bytes == model_file.stat().st_size


def test_the_dtypes_are_those_of_the_library() -> None:
    with pytest.raises(SafetensorError) as caught:
        deserialize(BROKEN["dtype unknown"])
    known = str(caught.value).split("expected one of ")[1].split(" at line")[0]
    assert [name.strip("`") for name in known.split(", ")] == list(DTYPE_BITS)


@pytest.mark.parametrize("kind", ["directory", "pipe", "loop", "dangling", "absent", "device"])
def test_what_is_not_a_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    assert refused(path).cause
