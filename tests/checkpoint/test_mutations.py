"""Thousands of damaged headers and indexes: success or our error, and nothing opened elsewhere.

Seeded, so that a failure comes again. The fast form runs a few hundred, `-m slow` ten thousand.
"""

from __future__ import annotations

import json
import random
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_files import SOUND, entry, file_bytes
from safetensors import SafetensorError, deserialize

from loftq_cli.checkpoint.index import INDEX_FILE, SINGLE_FILE, open_checkpoint
from loftq_cli.checkpoint.safetensors import read_header, read_tensor
from loftq_cli.errors import CorruptCheckpoint, LoftqError

FEW, MANY = 400, 10_000
MEMORY_LIMIT = 200 << 20
ODD_VALUES = [
    "null", "true", "-0", "-1", "0", "1", "2.0", "1e3", "1e999", str(2**63), str(2**64 - 1),
    str(2**64), "9" * 400, '""', '"F4"', '"F32"', '"../../../etc/passwd"', '"/etc/passwd"',
    '"\\ud800"', '"\\u0000"', "[]", "[0]", "[0,0,0]", "[[]]", "{}", '{"U8":null}', "NaN",
    "[" * 200, "[" * 130 + "]" * 130,
]  # fmt: skip
# The only reasons for which we may refuse what the crate accepts: see STRICTER in hostile_files.
STRICTER_REASONS = (
    "twice",
    "does not begin with",
    "described by an object",
    "dtype is not a string",
)


def mutate_text(text: bytes, random: random.Random) -> bytes:
    """One or two edits of the kinds that disks, downloads and attackers make."""
    raw = bytearray(text)
    for _ in range(random.choice((1, 1, 2))):
        place = random.randrange(len(raw) + 1)
        other = random.randrange(len(raw) + 1)
        kind = random.randrange(6)
        if kind == 0 and raw:
            raw[place % len(raw)] ^= 1 << random.randrange(8)
        elif kind == 1:
            del raw[place : place + random.randrange(1, 12)]
        elif kind == 2:
            raw[place:place] = raw[other : other + random.randrange(1, 60)]
        elif kind == 3:
            raw[place:place] = random.choice(b'{}[]",:0129eE-+.\\ \0\n\xff').to_bytes(1, "big")
        elif kind == 4:
            raw = replace_value(raw, random)
        else:
            raw[place:place] = random.choice(ODD_VALUES).encode()
    return bytes(raw)


def replace_value(raw: bytearray, random: random.Random) -> bytearray:
    """Put an odd value where some value ends: mostly this stays JSON."""
    ends = [i for i, byte in enumerate(raw) if byte in b",]}"]
    if not ends:
        return raw
    end = random.choice(ends)
    begin = max(raw.rfind(mark, 0, end) for mark in (b":", b",", b"["))
    return raw[: begin + 1] + random.choice(ODD_VALUES).encode() + raw[end:]


def mutate_file(raw: bytes, random: random.Random) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    kind = random.randrange(10)
    if kind == 0:
        return raw[: random.randrange(len(raw))]
    if kind == 1:
        return raw + random.randbytes(random.randrange(1, 9))
    if kind == 2:
        claimed = random.choice(
            (0, 1, length - 1, length + 1, 2**31, 2**63, random.getrandbits(64))
        )
        return file_bytes(header, data, max(claimed, 0))
    return file_bytes(mutate_text(header, random), data)


def base_files() -> list[bytes]:
    plain = {f"layer.{i}.weight": ("F32", [i, 2], i * 8) for i in range(4)}
    position, entries = 0, ['"__metadata__":{"format":"pt"}']
    for name, (dtype, shape, size) in plain.items():
        entries.append(f'"{name}":{entry(dtype, shape, [position, position + size])}')
        position += size
    some = ("empty tensors between others", "two halves of a byte", "unknown field", "one tensor")
    return [file_bytes("{" + ",".join(entries) + "}", bytes(position)), *(SOUND[n] for n in some)]


class Opened:
    """Every path that Python opens while `watching`; audit hooks cannot be taken off again."""

    watching = False
    paths: list[str] = []  # noqa: RUF012

    @classmethod
    def hook(cls, event: str, args: tuple[Any, ...]) -> None:
        if cls.watching and event in ("open", "os.listdir", "os.scandir"):
            cls.paths.append(str(args[0]))


sys.addaudithook(Opened.hook)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Runs something under the audit hook and within the memory limit."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def run(action: Callable[[], Any]) -> Any:
        Opened.paths.clear()
        Opened.watching = True
        try:
            return action()
        finally:
            Opened.watching = False
            outside = [path for path in Opened.paths if not path.startswith(str(tmp_path))]
            assert outside == []

    yield run
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < MEMORY_LIMIT


def read_everything(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    header = read_header(path)
    return {
        name: (info.dtype, list(info.shape), bytes(read_tensor(header, info)))
        for name, info in header.tensors.items()
    }


@pytest.mark.parametrize(
    ("count", "seed"), [(FEW, 0), pytest.param(MANY, 1, marks=pytest.mark.slow)]
)
def test_damaged_headers(
    count: int, seed: int, tmp_path: Path, watched: Callable[[Callable[[], Any]], Any]
) -> None:
    generator, bases, accepted, cause = random.Random(seed), base_files(), 0, ""
    path = tmp_path / SINGLE_FILE
    for step in range(count):
        raw = mutate_file(generator.choice(bases), generator)
        path.write_bytes(raw)
        try:
            theirs = {n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in deserialize(raw)}
        except SafetensorError:
            theirs = None
        try:
            ours = watched(lambda: read_everything(path))
        except CorruptCheckpoint as error:
            ours, cause = None, str(error.cause)
        stricter = ours is None and any(reason in cause for reason in STRICTER_REASONS)
        assert ours == theirs or stricter, (step, raw, cause)
        accepted += ours is not None
    assert 0 < accepted < count


@pytest.mark.parametrize(
    ("count", "seed"), [(FEW, 2), pytest.param(MANY, 3, marks=pytest.mark.slow)]
)
def test_damaged_indexes(
    count: int, seed: int, tmp_path: Path, watched: Callable[[Callable[[], Any]], Any]
) -> None:
    generator = random.Random(seed)
    model = tmp_path / "model"
    model.mkdir()
    weight_map = {}
    for shard in range(2):
        file = f"model-0000{shard + 1}-of-00002.safetensors"
        names = [f"layer.{shard}.weight", f"layer.{shard}.bias"]
        ends = zip(names, ([0, 2], [2, 4]), strict=True)
        header = ",".join(f'"{name}":{entry(offsets=offsets)}' for name, offsets in ends)
        (model / file).write_bytes(file_bytes("{" + header + "}", b"abcd"))
        weight_map |= dict.fromkeys(names, file)
    # What a traversal would reach if it were followed.
    (tmp_path / "secret.safetensors").write_bytes(SOUND["one tensor"])
    index = json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}).encode()
    outcomes = set()
    for _ in range(count):
        damaged = mutate_text(index, generator)
        if generator.random() < 0.2:
            name = generator.choice(["../secret.safetensors", str(tmp_path / "secret.safetensors")])
            damaged = damaged.replace(b"model-00001-of-00002.safetensors", name.encode(), 1)
        (model / INDEX_FILE).write_bytes(damaged)
        try:
            watched(lambda: open_checkpoint(model))
            outcomes.add("ok")
        except LoftqError as error:
            outcomes.add(f"{type(error).__name__} {error.exit_code}")
        assert str(tmp_path / "secret.safetensors") not in Opened.paths
        assert not any(".." in path for path in Opened.paths)
    assert outcomes == {"ok", "CorruptCheckpoint 1", "UnsafeCheckpoint 1"}


def test_memory_of_a_hostile_header(watched: Callable[[Callable[[], Any]], Any]) -> None:
    """Thirty megabytes of brackets, refused by counting them instead of building them."""
    from loftq_cli.checkpoint.safetensors import parse_header

    raw = file_bytes('{"a":[' + "[]," * 10_000_000 + "[]]}")

    def parse() -> None:
        with pytest.raises(CorruptCheckpoint):
            parse_header(raw, len(raw), "model.safetensors")

    watched(parse)
