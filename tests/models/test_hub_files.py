"""Weights read from a hub that cuts, delays, refuses and changes: the bytes of the files, or an
error, and never a mixture."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loftq_cli.checkpoint import samples
from loftq_cli.checkpoint.index import Checkpoint, open_checkpoint
from loftq_cli.checkpoint.safetensors import read_pieces
from loftq_cli.checkpoint.tensors import load_tensor
from loftq_cli.engines.pipeline import Timings, read_ahead
from loftq_cli.errors import CorruptCheckpoint, LoftqError
from loftq_cli.models import hub_files
from loftq_cli.models.hub_files import TRIES
from loftq_cli.models.remote import read_remote
from tests.models.stand_in_hub import Fault, StandInHub, running, talk_to

REPOSITORY = "org/model"
PIECE = 512


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two files, with tensors of many pieces, of less than one, and of none."""
    directory = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    shards = {
        "model-00001-of-00002.safetensors": {
            "a": torch.randn(37, 41),
            "b": torch.randn(7).to(torch.bfloat16),
            "empty": torch.empty(0, 3),
        },
        "model-00002-of-00002.safetensors": {"c": torch.randn(64, 64).to(torch.float16)},
    }
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    files = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(
        f'{{"weight_map": {str(files).replace(chr(39), chr(34))}}}'
    )
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited, without waiting them."""
    found: list[float] = []
    clock = SimpleNamespace(sleep=lambda seconds: found.append(seconds) if seconds else None)
    monkeypatch.setattr(hub_files, "time", clock)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    return found


@pytest.fixture
def hub(
    source: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[StandInHub]:
    monkeypatch.setattr(hub_files, "_PIECE_BYTES", PIECE)
    with running(StandInHub()) as hub:
        talk_to(hub, monkeypatch, tmp_path, "hf_here")
        hub.add_directory(REPOSITORY, source)
        yield hub


@pytest.fixture
def remote(hub: StandInHub) -> Checkpoint:
    found = read_remote(REPOSITORY, None).checkpoint
    hub.requests.clear()
    return found


def same_tensors(remote: Checkpoint, local: Checkpoint) -> None:
    assert remote.tensors.keys() == local.tensors.keys()
    for name in local.tensors:
        one, other = load_tensor(*remote.tensors[name]), load_tensor(*local.tensors[name])
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name


def by_turns(*faults: Fault | None) -> Callable[[str, int, int], Fault | None]:
    turns = itertools.cycle(faults)
    return lambda name, first, last: next(turns)


FAULTS = {
    "none": (None,),
    "cut": (Fault(broken_after=PIECE + 5), Fault(broken_after=0), Fault(broken_after=1)),
    "cut shorter": (Fault(shorter=3), Fault(shorter=PIECE + 1), None),
    "busy": (Fault(503), None, Fault(500), Fault(502)),
    "too many": (Fault(429, {"Retry-After": "7"}), None),
    "all": (
        *(Fault(503), Fault(broken_after=PIECE), Fault(429, {"Retry-After": "7"}), None),
        *(Fault(shorter=1), Fault(408), Fault(broken_after=3 * PIECE)),
    ),
}


@pytest.mark.parametrize("faults", FAULTS)
def test_the_bytes_are_those_of_the_files(
    faults: str, hub: StandInHub, source: Path, remote: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = open_checkpoint(source)
    hub.fault = by_turns(*FAULTS[faults])
    same_tensors(remote, local)
    same_tensors(remote.cast("float32"), local.cast("float32"))
    assert samples.samples(remote) == samples.samples(local)
    monkeypatch.setattr(samples, "WHOLE_BYTES", 0)
    monkeypatch.setattr(samples, "_BLOCK", 64)
    assert samples.samples(remote) == samples.samples(local)


def test_headers_are_read_through_the_same_faults(hub: StandInHub, source: Path) -> None:
    hub.fault = by_turns(None, Fault(broken_after=3), Fault(503), Fault(429))
    same_tensors(read_remote(REPOSITORY, None, tries=TRIES).checkpoint, open_checkpoint(source))


def test_a_tensor_is_one_request_and_a_cut_costs_one_piece(
    hub: StandInHub, remote: Checkpoint
) -> None:
    header, info = remote.tensors["a"]
    load_tensor(header, info)
    assert [each.range for each in hub.requests if "/resolve/" in each.path] == [
        f"bytes={info.start}-{info.end - 1}"
    ]
    hub.requests.clear()
    hub.fault = by_turns(Fault(broken_after=3 * PIECE + 5), None)
    load_tensor(header, info)
    asked = [each.range for each in hub.requests if each.status == 206]
    assert asked == [
        f"bytes={info.start}-{info.end - 1}",
        f"bytes={info.start + 3 * PIECE}-{info.end - 1}",
    ]


def test_waits_are_as_long_as_the_hub_says_and_grow_without(
    hub: StandInHub, remote: Checkpoint, waits: list[float]
) -> None:
    hub.fault = by_turns(Fault(429, {"Retry-After": "7"}), None)
    load_tensor(*remote.tensors["a"])
    assert waits == [8.0]  # huggingface_hub adds one
    waits.clear()
    hub.fault = by_turns(*3 * [Fault(broken_after=0)], *3 * [Fault(503)], None)
    load_tensor(*remote.tensors["a"])
    assert waits == [1.0, 2.0, 4.0, 1.0, 2.0, 4.0]


@pytest.mark.parametrize("fault", [Fault(broken_after=0), Fault(503), Fault(shorter=3)])
def test_a_hub_that_stays_away_is_given_up(
    fault: Fault, hub: StandInHub, remote: Checkpoint
) -> None:
    hub.fault = by_turns(fault)
    with pytest.raises(LoftqError, match=r"org/model/model-0.* could not be read") as caught:
        load_tensor(*remote.tensors["b"])
    assert caught.value.cause
    assert "same line" in str(caught.value.hint)
    assert len([each for each in hub.requests if "/where-" in each.path]) == TRIES + 1


def moved_commit(hub: StandInHub, name: str) -> None:
    hub.files[name].redirected = False
    hub.fault = by_turns(Fault(headers={"X-Repo-Commit": "f" * 40}))


def other_etag(hub: StandInHub, name: str) -> None:
    hub.files[name].etag = "another"


def other_size(hub: StandInHub, name: str) -> None:
    hub.files[name].beginning = bytes(hub.files[name].beginning) + b"x"


@pytest.mark.parametrize(
    ("change", "named"), [(moved_commit, "commit"), (other_etag, "etag"), (other_size, "size")]
)
def test_another_version_of_a_file_is_not_read(
    change: Callable[[StandInHub, str], None], named: str, hub: StandInHub, remote: Checkpoint
) -> None:
    header, info = remote.tensors["c"]
    change(hub, f"{REPOSITORY}/{header.path.name}")
    with pytest.raises(CorruptCheckpoint) as caught:
        load_tensor(header, info)
    assert f"its {named} was" in str(caught.value.cause)


@pytest.mark.parametrize(("length", "named"), [(-1, "is truncated"), (1, "has trailing bytes")])
def test_a_file_of_another_length_than_its_header_says(
    length: int, named: str, hub: StandInHub
) -> None:
    file = hub.files[f"{REPOSITORY}/model-00002-of-00002.safetensors"]
    file.total = file.size + length
    with pytest.raises(CorruptCheckpoint, match="model-00002") as caught:
        read_remote(REPOSITORY, None)
    assert named in str(caught.value.cause)


def test_a_change_in_the_middle_of_a_tensor(hub: StandInHub, remote: Checkpoint) -> None:
    header, info = remote.tensors["a"]

    def cut_and_change(name: str, first: int, last: int) -> Fault | None:
        other_etag(hub, f"{REPOSITORY}/{header.path.name}")
        return Fault(broken_after=2 * PIECE)

    hub.fault = cut_and_change
    with pytest.raises(CorruptCheckpoint, match="cannot be used"):
        load_tensor(header, info)


def test_a_hub_without_ranges_is_refused(hub: StandInHub, remote: Checkpoint) -> None:
    hub.ignores_ranges = True
    with pytest.raises(LoftqError) as caught:
        load_tensor(*remote.tensors["a"])
    assert "range" in str(caught.value.cause)
    assert "--stream" in str(caught.value.hint)


def test_another_process_reads_it_with_its_own_token(
    hub: StandInHub, source: Path, remote: Checkpoint
) -> None:
    header, _ = remote.tensors["a"]
    sent = pickle.dumps(header)
    assert b"hf_here" not in sent
    script = (
        "import hashlib, pickle, sys\n"
        "header = pickle.loads(sys.stdin.buffer.read())\n"
        "with header.opened() as pieces:\n"
        "    whole = b''.join(map(bytes, pieces(0, header.file_bytes)))\n"
        "print(hashlib.sha256(whole).hexdigest())\n"
    )
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=sent,
        capture_output=True,
        env=environ | {"HF_TOKEN": "hf_there", "NO_PROXY": "127.0.0.1"},
        check=True,
        timeout=60,
    )
    whole = (source / header.path.name).read_bytes()
    assert done.stdout.decode().split() == [hashlib.sha256(whole).hexdigest()]
    assert {each.authorization for each in hub.requests} == {"Bearer hf_there"}


def test_a_copy_holds_a_few_pieces(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_files, "_PIECE_BYTES", 1 << 20)
    size = 48 << 20
    save_file({"W": torch.zeros(size, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    hub.add_directory("org/large", tmp_path)
    header, info = read_remote("org/large", None).checkpoint.tensors["W"]
    tracemalloc.start()
    try:
        assert sum(len(piece) for piece in read_pieces(header, info)) == size
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_what_nobody_waits_for_is_not_tried_again(
    hub: StandInHub, remote: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Ctrl-C, or an error of the layer before."""
    monkeypatch.setattr(hub_files, "FIRST_WAIT", 20.0)
    _, info = remote.tensors["c"]

    def read(item: str) -> Any:
        return load_tensor(*remote.tensors[item])

    reading = read_ahead(["b", "c"], read, Timings())
    next(reading)
    hub.fault = by_turns(Fault(broken_after=0))
    asked = f"bytes={info.start}-{info.end - 1}"
    while asked not in [each.range for each in hub.requests if each.status != 302]:
        time.sleep(0.01)
    reading.close()
    assert len([each for each in hub.requests if each.range == asked]) == 2  # once, sent on
