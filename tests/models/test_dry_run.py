"""A dry run of a hub id reads headers; a real run brings along what goes with the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stand_in_hub import COMMIT, RemoteFile, StandInHub, header_of, running
from test_remote import loftq_process

from loftq_cli.errors import CorruptCheckpoint, ModelNotFound, UnsafeCheckpoint
from loftq_cli.models import spec
from loftq_cli.models.lookup import find_model
from loftq_cli.models.spec import cached_model

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
ATTENTION = {"model.layers.0.self_attn.q_proj.weight": (128, 64), "model.norm.weight": (64,)}
MLP = {"model.layers.0.mlp.up_proj.weight": (256, 64)}
ONE_FILE = {"model.safetensors": header_of(ATTENTION | MLP)}
TWO_FILES = {
    "model-00001-of-00002.safetensors": header_of(ATTENTION, "F16"),
    "model-00002-of-00002.safetensors": header_of(MLP),
}


def dry_run(hub: StandInHub, home: Path, model: object) -> Any:
    argv = ("quantize", "--model", str(model), "--dry-run", "--rank", "4", "--json")
    return loftq_process(hub, home, *argv)


def written(hub: StandInHub, repository: str, directory: Path) -> Path:
    """The same model as files, with zeros for weights."""
    directory.mkdir(parents=True)
    for name, file in hub.files.items():
        if name.startswith(f"{repository}/"):
            data = file.beginning.ljust(file.size, b"\0")
            (directory / name.removeprefix(f"{repository}/")).write_bytes(data)
    return directory


@pytest.mark.parametrize(
    ("shards", "repository"),
    [(ONE_FILE, "gpt2"), (TWO_FILES, "org/small")],
    ids=["one file", "two files"],
)
def test_only_headers_are_asked_for_and_the_results_are_those_of_the_files(
    shards: dict[str, dict[str, Any]], repository: str, tmp_path: Path
) -> None:
    """gpt2 is in the shipped table, which must not answer."""
    with running(StandInHub()) as hub:
        headers = hub.add_model(repository, CONFIG, shards)
        done = dry_run(hub, tmp_path / "home", repository)
    assert done.returncode == 0, done.stderr
    assert f"note: asking the hub about {repository}" in done.stderr
    assert hub.served(".safetensors") == headers
    about_weights = [each for each in hub.requests if each.path.endswith(".safetensors")]
    assert all(each.range for each in about_weights)
    assert not any((tmp_path / "home").rglob("*.safetensors"))
    remote = json.loads(done.stdout)
    assert remote["model"] == {"id": repository, "revision": COMMIT, "source": "hub"}

    directory = written(hub, repository, tmp_path / "files")
    local = json.loads(dry_run(hub, tmp_path / "home", directory).stdout)
    assert local["model"]["source"] == "directory"
    assert remote["results"] == local["results"]


def test_a_cached_snapshot_is_read_without_the_network(tmp_path: Path) -> None:
    hub = StandInHub(endpoint="http://127.0.0.1:9")
    hub.add_model("org/small", CONFIG, TWO_FILES)
    written(hub, "org/small", tmp_path / "hub" / "models--org--small" / "snapshots" / COMMIT)
    done = dry_run(hub, tmp_path, f"org/small@{COMMIT}")
    assert done.returncode == 0, done.stderr
    identity = {"id": "org/small", "revision": COMMIT, "source": "hub"}
    assert json.loads(done.stdout)["model"] == identity


def test_offline_a_known_model_is_not_answered_from_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="the files of 'gpt2' are not here"):
        find_model("gpt2", print, with_headers=True)


def test_quantized_models_and_empty_files_are_refused(tmp_path: Path) -> None:
    with running(StandInHub()) as hub:
        quantized = {**CONFIG, "quantization_config": {"quant_method": "gptq"}}
        hub.add_model("org/gptq", quantized, ONE_FILE)
        assert "already quantized (gptq)" in dry_run(hub, tmp_path, "org/gptq").stderr
        assert hub.served(".safetensors") == 0
        hub.files["org/empty/config.json"] = RemoteFile(json.dumps(CONFIG).encode())
        hub.files["org/empty/model.safetensors"] = RemoteFile(b"\2" + bytes(7) + b"{}")
        done = dry_run(hub, tmp_path, "org/empty")
    assert done.returncode == 1
    assert "its weight files hold no tensor" in done.stderr


@pytest.mark.parametrize(
    ("weight_map", "error"),
    [
        ({"x": "*"}, UnsafeCheckpoint),
        ({"x": "[a-z]*.safetensors"}, UnsafeCheckpoint),
        ({"x": "../../x.safetensors"}, UnsafeCheckpoint),
        ({"x": 1}, CorruptCheckpoint),
        ([], CorruptCheckpoint),
    ],
)
def test_a_hostile_index_is_no_list_of_patterns(
    weight_map: object, error: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    snapshot = tmp_path / "models--org--evil" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    index = json.dumps({"weight_map": weight_map})
    (snapshot / "model.safetensors.index.json").write_text(index)
    asked: list[list[str]] = []

    def download(repository: str, *, allow_patterns: list[str], **options: object) -> str:
        asked.append(allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(spec, "_files_of", lambda *_: {})
    with pytest.raises(error):
        spec.resolve_model("org/evil")
    assert len(asked) == 1, "nothing but the description was asked for"

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("*", "[a-z]*.safetensors"):
        (snapshot / name).touch()
    assert cached_model("org/evil", COMMIT) is None
