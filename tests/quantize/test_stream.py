"""`quantize --stream`: the weights come from the hub piece by piece, and the result is the same."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.engines import shards
from loftq_cli.models import hub_files
from tests.battery import BATTERY
from tests.conftest import Outcome
from tests.models.stand_in_hub import COMMIT, Fault, RemoteFile, StandInHub, running, talk_to
from tests.quantize.test_killed import contents

Loftq = Callable[..., Outcome]
ID = "org/model"
LINE = ("quantize", "-m", ID, "--rank", 4, "--iterations", 1)
FAULTS = (
    *(None, Fault(broken_after=1000), Fault(503), Fault(429, {"Retry-After": "3"})),
    *(Fault(shorter=100), Fault(broken_after=0)),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in four files, of 16 and 32 bits, with something beside its weights."""
    directory = tmp_path_factory.mktemp("streamed") / "source"
    model = BATTERY["llama"].build(dtype=torch.bfloat16)
    model.model.norm.float()
    model.save_pretrained(directory, max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return directory


@pytest.fixture(scope="module")
def hub(source: Path) -> Iterator[StandInHub]:
    with pytest.MonkeyPatch.context() as patch, running(StandInHub()) as hub:
        patch.setattr(shards, "SHARD_BYTES", 20_000)
        patch.setattr(hub_files, "FIRST_WAIT", 0.001)
        clock = SimpleNamespace(sleep=lambda seconds: None)
        patch.setattr("huggingface_hub.utils._http.time", clock)
        hub.add_directory(ID, source)
        yield hub


@pytest.fixture(scope="module")
def from_disk(hub: StandInHub, loftq: Loftq, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is made of the same model when it is downloaded."""
    place = tmp_path_factory.mktemp("disk")
    with pytest.MonkeyPatch.context() as patch:
        talk_to(hub, patch, place, "hf_token")
        done = loftq(*LINE, "-o", place / "out")
    assert done.code == 0, done.err
    assert list((place / "hub").rglob("*.safetensors")), "this one has a copy"
    return place / "out"


@pytest.fixture
def home(hub: StandInHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where an empty cache is; the hub has no faults."""
    talk_to(hub, monkeypatch, tmp_path / "home", "hf_token")
    monkeypatch.setattr(hub, "fault", lambda name, first, last: None)
    hub.requests.clear()
    return tmp_path / "home"


def nothing_of_the_source_is_in(*places: Path) -> None:
    """Neither under its name nor under another, as in the blobs of a cache."""
    for place in places:
        for path in place.rglob("*"):
            assert path.suffix != ".safetensors", path
            assert not path.is_file() or path.stat().st_size < 20_000, path


def same_as(one: Path, other: Path) -> None:
    """File by file; in the report only what says how the weights were read is another."""
    found, expected = contents(one), contents(other)
    assert found.keys() == expected.keys()
    reports = [json.loads(each.pop("loftq_report.json")) for each in (found, expected)]
    for name, content in expected.items():
        assert found[name] == content, name
    for report in reports:
        del report["streamed_from"]
        for file in report["source_files"]:
            del file["etag"]
    assert reports[0] == reports[1]


def test_the_files_are_those_of_a_download(
    hub: StandInHub, from_disk: Path, home: Path, tmp_path: Path, loftq: Loftq,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(hub_files, "_PIECE_BYTES", 4096)
    turns = itertools.cycle(FAULTS)
    hub.fault = lambda name, first, last: next(turns)
    done = loftq(*LINE, "-o", tmp_path / "out", "--stream", "--json")
    assert done.code == 0, done.err
    same_as(tmp_path / "out", from_disk)
    nothing_of_the_source_is_in(home)
    assert COMMIT in done.err
    assert {each.status for each in hub.requests} >= {206, 302, 429, 503}
    about = [each for each in hub.requests if f"/{ID}/resolve/" in each.path]
    assert {each.authorization for each in about} == {"Bearer hf_token"}
    weights = [each for each in about if each.path.endswith(".safetensors")]
    assert all(f"/resolve/{COMMIT}/" in each.path for each in weights)

    document = json.loads(done.out)
    assert document["model"] == {"id": ID, "revision": COMMIT, "source": "hub"}
    assert document["results"]["streamed_from"] == hub.endpoint
    etags = {each["name"]: each["etag"] for each in document["results"]["source_files"]}
    assert etags == {
        name.rpartition("/")[2]: file.etag
        for name, file in hub.files.items()
        if name.endswith(".safetensors")
    }

    # Once more it is complete; what a download made is the same run.
    shutil.copytree(from_disk, tmp_path / "copy" / "out")
    for made, told in ((tmp_path / "out", True), (tmp_path / "copy" / "out", False)):
        again = loftq(*LINE, "-o", made, "--stream", "--resume", "--format", "table")
        assert again.code == 0, again.err
        assert "already complete" in again.err
        assert (f"streamed from {hub.endpoint}" in again.out) == told


def test_bits_and_ranks_that_are_measured_first(
    home: Path, source: Path, tmp_path: Path, loftq: Loftq
) -> None:
    line = (*LINE, "--target-bits", "3.5", "--rank-budget")
    for more, out in (((), "disk"), (("--stream",), "stream")):
        done = loftq(*line, "-o", tmp_path / out / "out", *more)
        assert done.code == 0, done.err
    same_as(tmp_path / "stream" / "out", tmp_path / "disk" / "out")


def test_verify_reads_the_source_again_from_the_hub(
    home: Path, tmp_path: Path, loftq: Loftq
) -> None:
    out = tmp_path / "out"
    done = loftq(*LINE, "-o", out, "--stream", "--verify")
    assert done.code == 0, done.err
    assert "verified: files, container, adapter, totals, residuals, copies, forward" in done.err
    nothing_of_the_source_is_in(home)
    # Alone it downloads nothing, and says what there is to do.
    later = loftq("verify", out, "--json")
    assert later.code == 0, later.err
    tests = {test["name"]: test for test in json.loads(later.out)["results"]["tests"]}
    assert tests["residuals"]["status"] == "skipped"
    assert "--source" in tests["residuals"]["detail"]
    named = loftq("verify", out, "--source", ID)
    assert named.code == 1
    assert f"hf download {ID}" in named.err
    nothing_of_the_source_is_in(home)


def test_a_killed_run_goes_on_with_the_same_commit_only(
    hub: StandInHub, source: Path, from_disk: Path, home: Path, tmp_path: Path, loftq: Loftq,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    header, info = open_checkpoint(source).tensors["model.layers.1.mlp.down_proj.weight"]
    reached, over = threading.Event(), threading.Event()

    def stall(name: str, first: int, last: int) -> None:
        if name == f"{ID}/{header.path.name}" and first == info.start:
            reached.set()
            over.wait(60)

    hub.fault = stall
    line = [*map(str, LINE), "-o", str(tmp_path / "out"), "--stream"]
    script = (
        "import sys; from loftq_cli.engines import shards; shards.SHARD_BYTES = 20_000\n"
        "from loftq_cli.cli import main; main(sys.argv[1:])"
    )
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environ |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_other"}
    with subprocess.Popen([sys.executable, "-c", script, *line], env=environ) as run:
        assert reached.wait(120)
        run.kill()
    over.set()
    nothing_of_the_source_is_in(home)
    assert any((tmp_path / "out.partial").rglob("model-*.safetensors"))

    monkeypatch.setattr(hub, "commit", "e" * 40)
    moved = loftq(*line)
    assert moved.code == 1
    assert "revision" in moved.err
    assert "--force" in moved.err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(hub, "commit", COMMIT)
    hub.requests.clear()
    again = loftq(*line, "--workers", 2)  # which read for themselves
    assert again.code == 0, again.err
    assert "going on with" in again.err
    same_as(tmp_path / "out", from_disk)
    done, first = open_checkpoint(source).tensors["model.layers.0.mlp.down_proj.weight"]
    asked = {(Path(each.path).name, each.range) for each in hub.requests}
    assert (header.path.name, f"bytes={info.start}-{info.end - 1}") in asked
    assert (done.path.name, f"bytes={first.start}-{first.end - 1}") not in asked


def refused(loftq: Loftq, out: Path, code: int, *argv: object) -> str:
    done = loftq("quantize", "-o", out, "--stream", *argv)
    assert (done.code, done.out) == (code, ""), done.err
    assert "Traceback" not in done.err
    assert not out.exists()
    return done.err


def test_what_cannot_be_streamed(
    hub: StandInHub, home: Path, source: Path, tmp_path: Path, loftq: Loftq,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert "is a directory here" in refused(loftq, out, 2, "-m", source)
    assert "is the built-in model" in refused(loftq, out, 2)
    assert "is a directory here" in refused(loftq, out, 2, "-m", source, "--dry-run")
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    calibrated = ("-m", ID, "--init", "calibrated", "--calibration-text", text)
    assert "runs the original model" in refused(loftq, out, 2, *calibrated)
    assert not hub.requests, "all that is known without the hub"
    hub.files["org/pickle/config.json"] = RemoteFile(b'{"model_type": "llama"}')
    hub.files["org/pickle/pytorch_model.bin"] = RemoteFile(b"\x80", 10**9)
    assert "as pickle only" in refused(loftq, out, 1, "-m", "org/pickle")
    assert "no model 'org/none'" in refused(loftq, out, 1, "-m", "org/none")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "forbids the network" in refused(loftq, out, 1, "-m", ID)


def test_a_dry_run_reads_headers(hub: StandInHub, home: Path, loftq: Loftq) -> None:
    done: Any = loftq("quantize", "-m", ID, "--stream", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["results"]["streamed_from"] is None
