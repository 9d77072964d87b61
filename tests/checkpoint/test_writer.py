"""The writer: the reference's bytes, in any order, whatever the disk does."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patched_os import PatchedOs
from safetensors import TensorSpec, safe_open, serialize

from loftq_cli.checkpoint import files, writer
from loftq_cli.checkpoint.safetensors import read_header, read_tensor
from loftq_cli.checkpoint.writer import (
    NewFile,
    PlannedTensor,
    WrittenFile,
    copy_file,
    disk_error,
    free_bytes,
    hash_file,
    require_free_space,
    write_bytes_atomically,
    write_safetensors,
)
from loftq_cli.errors import CorruptCheckpoint, DoesNotFit, WriteFailed
from loftq_cli.formats import DTYPE_BITS

# The crate's names for the dtypes, as its Python binding takes them.
SPEC_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16",
    "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "F64": "float64",
    "I64": "int64", "U64": "uint64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
}  # fmt: skip
PLANS = st.dictionaries(
    st.text(max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(list(SPEC_NAMES)), st.lists(st.integers(0, 4), max_size=3)),
    max_size=7,
).map(lambda plan: [PlannedTensor(name, d, tuple(shape)) for name, (d, shape) in plan.items()])


def random_data(plan: list[PlannedTensor], seed: int = 0) -> dict[str, bytes]:
    generator = random.Random(seed)
    return {tensor.name: generator.randbytes(tensor.nbytes) for tensor in plan}


def reference_bytes(plan: list[PlannedTensor], data: dict[str, bytes]) -> bytes:
    buffers = {name: ctypes.create_string_buffer(raw, len(raw) + 1) for name, raw in data.items()}
    specs = {
        tensor.name: TensorSpec(
            dtype=SPEC_NAMES[tensor.dtype],
            shape=tensor.shape,
            data_ptr=ctypes.addressof(buffers[tensor.name]),
            data_len=tensor.nbytes,
        )
        for tensor in plan
    }
    return bytes(serialize(specs, {"format": "pt"}))


PLAN = [
    PlannedTensor("layer.weight", "U8", (6, 1)),
    PlannedTensor("layer.weight.absmax", "F32", (3,)),
    PlannedTensor("norm", "BF16", (5,)),
    PlannedTensor("empty", "F32", (0, 4)),
]
DATA = random_data(PLAN)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def entries(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(plan=PLANS, order=st.randoms(use_true_random=False))
def test_byte_for_byte_the_reference(
    path: Path, plan: list[PlannedTensor], order: random.Random
) -> None:
    data = random_data(plan)
    expected = reference_bytes(plan, data)
    arriving = list(data.items())
    order.shuffle(arriving)
    written = write_safetensors(path, plan, arriving)
    assert path.read_bytes() == expected
    assert written == WrittenFile(path.name, len(expected), sha256(expected).hexdigest())
    assert hash_file(path) == written


def test_every_dtype_is_laid_out_and_read_again(path: Path) -> None:
    plan = [PlannedTensor(f"x.{dtype}", dtype, (8, 2)) for dtype in reversed(DTYPE_BITS)]
    data = random_data(plan)
    write_safetensors(path, plan, data.items())
    header = read_header(path)
    assert [info.dtype for info in header.tensors.values()] == list(reversed(DTYPE_BITS))
    assert {n: bytes(read_tensor(header, info)) for n, info in header.tensors.items()} == data


def test_opens_with_the_library(path: Path) -> None:
    write_safetensors(path, PLAN, DATA.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("empty").shape == (0, 4)
        norm = file.get_tensor("norm")
        assert norm.dtype is torch.bfloat16
        assert norm.view(torch.uint8).numpy().tobytes() == DATA["norm"]


def test_no_tensors(path: Path) -> None:
    write_safetensors(path, [], [], {})
    assert read_header(path).tensors == {}


def test_metadata_is_sorted(path: Path) -> None:
    write_safetensors(path, PLAN, DATA.items(), {"b": "2", "a": "1"})
    first = path.read_bytes()
    write_safetensors(path, PLAN, DATA.items(), {"a": "1", "b": "2"})
    assert path.read_bytes() == first


def test_tensors_in_pieces_and_interleaved(path: Path) -> None:
    write_safetensors(path, PLAN, DATA.items())
    whole = path.read_bytes()
    pieces = [
        (name, data[start : start + 4]) for start in range(0, 12, 4) for name, data in DATA.items()
    ]
    assert write_safetensors(path, PLAN, pieces) == hash_file(path)
    assert path.read_bytes() == whole


def test_buffers_of_any_item_size(path: Path) -> None:
    plan = [PlannedTensor("W", "F32", (2, 3)), PlannedTensor("none", "F32", (0, 3))]
    tensors = [
        ("W", memoryview(torch.ones(2, 3).numpy())),
        ("none", memoryview(torch.ones(0, 3).numpy())),
    ]
    write_safetensors(path, plan, tensors)
    header = read_header(path)
    assert bytes(read_tensor(header, header.tensors["W"])) == torch.ones(6).numpy().tobytes()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([*DATA.items()][1:], "1 tensors incomplete, layer.weight first"),
        ([], "3 tensors incomplete"),
        ([*DATA.items(), ("norm", DATA["norm"])], "bytes of norm that were not planned"),
        ([*DATA.items(), ("other", b"x")], "bytes of other that were not planned"),
        ([("norm", DATA["norm"] + b"x")], "bytes of norm that were not planned"),
        ({**DATA, "norm": DATA["norm"][:-1]}.items(), "1 tensors incomplete, norm first"),
    ],
)
def test_mistakes_of_the_caller(path: Path, tensors: list[tuple[str, bytes]], message: str) -> None:
    path.write_bytes(b"the former file")
    with pytest.raises(ValueError, match=message):
        write_safetensors(path, PLAN, tensors)
    assert path.read_bytes() == b"the former file"
    assert entries(path) == [path.name]


@pytest.mark.parametrize("name", ["a", "__metadata__"])
def test_names_must_be_unique(path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="same name"):
        write_safetensors(path, [PlannedTensor("a", "U8", ()), PlannedTensor(name, "U8", ())], [])
    assert entries(path) == []


def test_an_error_of_the_producer_leaves_nothing(path: Path) -> None:
    def produce() -> Iterator[tuple[str, bytes]]:
        yield "layer.weight", DATA["layer.weight"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, PLAN, produce())
    assert entries(path) == []


def test_the_file_appears_only_when_it_is_complete(path: Path) -> None:
    def produce() -> Iterator[tuple[str, bytes]]:
        for item in DATA.items():
            assert not path.exists()
            (temporary,) = path.parent.iterdir()
            assert temporary.stat().st_size == len(reference_bytes(PLAN, DATA))
            yield item

    write_safetensors(path, PLAN, produce())
    assert entries(path) == [path.name]


def test_what_a_dead_process_of_our_id_left_is_no_obstacle(path: Path) -> None:
    leftover = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    leftover.write_bytes(b"x" * 10_000)
    write_bytes_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert entries(path) == [path.name]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_modes_follow_the_umask(path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_safetensors(path, PLAN, DATA.items())
        copy_file(path, path.with_name("copy"))
        write_bytes_atomically(path.with_name("small"), b"{}")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {mode}


def test_short_writes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(path, PLAN, DATA.items())
    expected = path.read_bytes()

    def short(fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data[:3], offset)

    monkeypatch.setattr(writer, "os", PatchedOs(pwrite=short))
    written = write_safetensors(path, PLAN, DATA.items())
    assert path.read_bytes() == expected
    assert written == hash_file(path)


def test_interrupted_calls_are_continued(tmp_path: Path) -> None:
    """A storm of real signals: every system call may be interrupted, none may be lost."""
    source = tmp_path / "source"
    source.write_bytes(random.Random(0).randbytes(48 << 20))
    arrived = 0

    def count(*_: object) -> None:
        nonlocal arrived
        arrived += 1

    before = signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        written = copy_file(source, tmp_path / "copy")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert arrived > 10
    assert written.sha256 == hash_file(source).sha256 == hash_file(tmp_path / "copy").sha256


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_that_cannot_allocate(
    path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writer, "os", PatchedOs(posix_fallocate=refuse))
    write_safetensors(path, PLAN, DATA.items())
    assert path.read_bytes() == reference_bytes(PLAN, DATA)


@pytest.mark.parametrize("size", [0, 1, (8 << 20) + 5])
def test_copying(tmp_path: Path, size: int) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(random.Random(size).randbytes(size))
    source.chmod(0o400)
    written = copy_file(source, copy)
    assert copy.read_bytes() == source.read_bytes()
    assert written == WrittenFile("copy", size, sha256(source.read_bytes()).hexdigest())
    assert copy.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_copying_what_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"a" * 100)

    def write_and_change(fd: int, data: memoryview, offset: int) -> int:
        source.write_bytes(b"b" * 101)
        return os.pwrite(fd, data, offset)

    monkeypatch.setattr(writer, "os", PatchedOs(pwrite=write_and_change))
    with pytest.raises(CorruptCheckpoint):
        copy_file(source, copy)
    assert entries(copy) == ["source"]


def test_copying_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint):
        copy_file(tmp_path / "source", tmp_path / "copy")


def test_a_directory_that_is_not_there(path: Path) -> None:
    with pytest.raises(WriteFailed) as caught:
        write_bytes_atomically(path.parent / "gone" / "x", b"")
    assert caught.value.cause == "No such file or directory"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("code", "kind", "word"),
    [
        (errno.ENOSPC, DoesNotFit, "missing"),
        (errno.EDQUOT, DoesNotFit, "missing"),
        (errno.EFBIG, DoesNotFit, "ulimit"),
        (errno.EACCES, WriteFailed, "permissions"),
        (errno.EROFS, WriteFailed, "--output"),
        (errno.EIO, WriteFailed, "disk"),
        (errno.ENAMETOOLONG, WriteFailed, "shorter"),
    ],
)
def test_what_the_disk_says(tmp_path: Path, code: int, kind: type, word: str) -> None:
    error = disk_error(OSError(code, os.strerror(code)), tmp_path / "a" / "b", 1 << 60)
    assert type(error) is kind
    assert str(tmp_path) in error.what
    assert os.strerror(code) in (error.cause or "")
    assert word in f"{error.cause} {error.hint}"


def test_free_space(tmp_path: Path) -> None:
    free = free_bytes(tmp_path / "not" / "yet" / "there")
    assert free > 0
    require_free_space(tmp_path, 0)
    with pytest.raises(DoesNotFit) as caught:
        require_free_space(tmp_path / "OUT", free + (3 << 40))
    assert caught.value.exit_code == 4
    assert "TiB missing" in (caught.value.cause or "") or "GiB missing" in (
        caught.value.cause or ""
    )


def test_a_real_limit(tmp_path: Path) -> None:
    """No injection: the kernel itself refuses to let the file grow."""
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from loftq_cli.checkpoint.writer import write_bytes_atomically\n"
        "from loftq_cli.errors import DoesNotFit\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_bytes_atomically(Path(sys.argv[1], 'x'), bytes(1001))\n"
        "except DoesNotFit as error: sys.exit(error.exit_code)\n"
    )
    root = Path(writer.__file__).parents[2]
    code = subprocess.run(
        [sys.executable, "-c", script, tmp_path], env={"PYTHONPATH": str(root)}, timeout=60
    ).returncode
    assert code == 4
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_is_hashed_without_reading_it_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(files, "read_at", unexpected)
    with NewFile(path, 4) as file:
        file.write(memoryview(b"ab"), 0)
        file.write(memoryview(b"cd"), 2)
    assert file.written.sha256 == sha256(b"abcd").hexdigest()
