"""Tensors read by position: the bytes the library reads, and an error when the file moves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patched_os import PatchedOs
from safetensors.torch import load_file, save_file

from loftq_cli.checkpoint import files
from loftq_cli.checkpoint.safetensors import (
    Header,
    read_header,
    read_pieces,
    read_tensor,
)
from loftq_cli.errors import CorruptCheckpoint

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
TENSORS = st.dictionaries(
    st.text(max_size=20).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)),
    max_size=6,
)


def raw(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    values = torch.randint(0, 2 if dtype is torch.bool else 100, shape)
    return values.to(dtype)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(TENSORS)
def test_random_files(tmp_path: Path, plan: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: random_tensor(*spec) for name, spec in plan.items()}, path)
    expected = load_file(path)
    header = read_header(path)
    assert header.tensors.keys() == expected.keys()
    for name, info in header.tensors.items():
        tensor = expected[name]
        assert info.shape == tuple(tensor.shape)
        assert (info.elements, info.nbytes) == (tensor.numel(), tensor.nbytes)
        assert bytes(read_tensor(header, info)) == raw(tensor)
        assert b"".join(map(bytes, read_pieces(header, info))) == raw(tensor)


@pytest.fixture
def header(tmp_path: Path) -> Header:
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    save_file({"W": torch.randn(40, 25), "b": torch.randn(25)}, path, {"format": "pt"})
    return read_header(path)


def test_metadata(header: Header) -> None:
    assert header.metadata == {"format": "pt"}


def test_pieces_of_a_large_tensor(header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 96)
    info = header.tensors["W"]
    pieces = [bytes(piece) for piece in read_pieces(header, info)]
    assert max(map(len, pieces)) == 96
    assert b"".join(pieces) == raw(load_file(header.path)["W"])


def test_short_reads_are_continued(header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(fd, [buffers[0][:7]], offset)

    monkeypatch.setattr(files, "os", PatchedOs(preadv=short))
    assert bytes(read_tensor(header, header.tensors["W"])) == raw(load_file(header.path)["W"])


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    os.utime(path, ns=(1, 1))


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(1, 1))  # the clock of the file system may not have ticked since
    other.replace(path)


CHANGES = [_append, _truncate, _rewrite, _replace]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_after_its_header(
    header: Header, change: Callable[[Path], None]
) -> None:
    change(header.path)
    with pytest.raises(CorruptCheckpoint) as caught:
        read_tensor(header, header.tensors["b"])
    assert "changed" in (caught.value.cause or "")


@pytest.mark.parametrize("change", [_append, _truncate, _rewrite])
def test_a_file_that_changes_while_it_is_read(
    header: Header, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapping would die of SIGBUS on the truncated one."""

    def read_and_change(fd: int, buffers: list[memoryview], offset: int) -> int:
        change(header.path)
        return os.preadv(fd, buffers, offset)

    monkeypatch.setattr(files, "os", PatchedOs(preadv=read_and_change))
    with pytest.raises(CorruptCheckpoint):
        read_tensor(header, max(header.tensors.values(), key=lambda info: info.end))


def test_a_file_that_went_away(header: Header) -> None:
    header.path.unlink()
    with pytest.raises(CorruptCheckpoint) as caught:
        read_tensor(header, header.tensors["b"])
    assert caught.value.cause == "No such file or directory"


def test_a_disk_that_fails(header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "os", PatchedOs(preadv=broken))
    with pytest.raises(CorruptCheckpoint) as caught:
        read_tensor(header, header.tensors["b"])
    assert caught.value.cause == "Input/output error"
