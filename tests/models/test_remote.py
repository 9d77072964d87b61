"""Hub ids through a stand-in hub: only headers are fetched, however large the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stand_in_hub import COMMIT, RemoteFile, StandInHub, header_of, running

from loftq_cli.errors import (
    AlreadyQuantized,
    CorruptCheckpoint,
    LoftqError,
    ModelNotFound,
    UnsafeCheckpoint,
)
from loftq_cli.models.known import known_model
from loftq_cli.models.remote import read_remote

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
LAYER = {"model.layers.0.self_attn.q_proj.weight": (64, 64)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    from huggingface_hub import constants

    with running(StandInHub()) as hub:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def llama_70b() -> dict[str, dict[str, Any]]:
    """Headers of Llama 2 70B in 15 shards, as its publisher has it."""
    found = known_model("meta-llama/Llama-2-70b-hf")
    assert found is not None
    shapes: dict[str, tuple[int, ...]] = {
        layer.tensor: (layer.out_features, layer.in_features) for layer in found[1].layers
    }
    shapes |= {left.tensor: left.shape for left in found[1].inventory.left}
    shapes |= {f"model.layers.{n}.input_layernorm.weight": (8192,) for n in range(80)}
    shapes |= {f"model.layers.{n}.post_attention_layernorm.weight": (8192,) for n in range(80)}
    shapes["model.norm.weight"] = (8192,)
    names = list(shapes)
    return {
        f"model-{n + 1:05d}-of-00015.safetensors": header_of(
            {name: shapes[name] for name in names[n::15]}
        )
        for n in range(15)
    }


def loftq_process(hub: StandInHub, home: Path, *argv: str, **environ: str) -> Any:
    keep = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "loftq_cli", *argv],
        capture_output=True,
        text=True,
        env=keep
        | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        | environ,
        check=False,
        timeout=60,
    )


def test_of_a_sharded_70b_only_the_headers_are_fetched(hub: StandInHub, tmp_path: Path) -> None:
    headers = hub.add_model("org/huge", {**CONFIG, "tie_word_embeddings": False}, llama_70b())
    done = loftq_process(
        hub, tmp_path, "sweep-ranks", "-m", "org/huge", "--json", HF_TOKEN="hf_secret"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["model"] == {"id": "org/huge", "revision": COMMIT, "source": "hub"}
    assert document["results"]["base_parameters"] == 68_976_648_192
    assert hub.served(".safetensors") == headers
    assert headers < 200_000
    small = hub.served("/config.json") + hub.served("/model.safetensors.index.json")
    assert sum(each.body_bytes for each in hub.requests) == headers + small
    # Two ranges a shard, each sent on once; config, index, and the single file that is not there.
    # (huggingface_hub may ask the hub something of its own once a day, which is no file.)
    about_files = [each for each in hub.requests if "/org/huge/" in each.path]
    assert len(about_files) == 4 * 15 + 3
    assert {each.authorization for each in about_files} == {"Bearer hf_secret"}
    assert not any(tmp_path.rglob("*.safetensors")), "nothing is written to the cache"
    assert "note: asking the hub about org/huge" in done.stderr


def test_a_dry_run_of_a_hub_model_fetches_headers_only(hub: StandInHub, tmp_path: Path) -> None:
    headers = hub.add_model("org/huge", {**CONFIG, "tie_word_embeddings": False}, llama_70b())
    done = loftq_process(hub, tmp_path, "quantize", "-m", "org/huge", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["model"]["revision"] == COMMIT
    assert document["results"]["totals"]["parameters"] == 68_976_648_192
    assert hub.served(".safetensors") == headers


def test_targets_of_a_single_file(hub: StandInHub, tmp_path: Path) -> None:
    shapes = {**LAYER, "model.layers.0.mlp.up_proj.weight": (128, 64)}
    headers = hub.add_model("small", CONFIG, {"model.safetensors": header_of(shapes)})
    done = loftq_process(hub, tmp_path, "targets", "-m", "small@main", "--quiet")
    assert done.returncode == 0, done.stderr
    names = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert names == ["name", "q_proj", "up_proj"]
    assert hub.served(".safetensors") == headers
    assert done.stderr == ""


def test_the_first_answer_pins_the_commit(hub: StandInHub) -> None:
    hub.add_model("org/small", CONFIG, {"model.safetensors": header_of(LAYER)})
    assert read_remote("org/small", None).commit == COMMIT
    first, *others = [each.path for each in hub.requests if "/resolve/" in each.path]
    assert "/resolve/main/" in first
    assert all(f"/resolve/{COMMIT}/" in path for path in others)


def test_a_server_that_knows_no_ranges(hub: StandInHub) -> None:
    hub.ignores_ranges = True
    hub.add_model("org/small", CONFIG, {"model.safetensors": header_of(LAYER)})
    assert [info.name for info in read_remote("org/small", None).checkpoint.infos] == list(LAYER)


def refused(kind: type[LoftqError], repository: str, revision: str | None = None) -> LoftqError:
    with pytest.raises(kind) as caught:
        read_remote(repository, revision)
    assert caught.value.cause
    return caught.value


def test_what_is_not_there(hub: StandInHub) -> None:
    hub.files["org/data/README.md"] = RemoteFile(b"#")
    hub.add_model("org/small", CONFIG, {"model.safetensors": header_of(LAYER)})
    hub.gated.add("org/gated")
    assert "no model 'org/none' on the hub" in refused(ModelNotFound, "org/none").what
    assert "has no revision 'v9'" in refused(ModelNotFound, "org/small", "v9").what
    assert "has no config.json" in refused(ModelNotFound, "org/data").what
    assert "HF_TOKEN" in str(refused(ModelNotFound, "org/gated").hint)


def test_pickles_and_nothing(hub: StandInHub) -> None:
    hub.files["org/pickle/config.json"] = RemoteFile(json.dumps(CONFIG).encode())
    assert "no model.safetensors" in refused(ModelNotFound, "org/pickle").what
    hub.files["org/pickle/pytorch_model.bin"] = RemoteFile(b"\x80", 10**9)
    assert "pickle only" in refused(UnsafeCheckpoint, "org/pickle").what
    assert hub.served(".bin") == 1


def test_an_index_that_leads_elsewhere_or_contradicts_its_shards(hub: StandInHub) -> None:
    hub.add_model("org/evil", CONFIG, {"a.safetensors": header_of(LAYER)})
    index = hub.files["org/evil/model.safetensors.index.json"]
    index.beginning = json.dumps({"weight_map": {"x": "../../other/a.safetensors"}}).encode()
    refused(UnsafeCheckpoint, "org/evil")
    index.beginning = json.dumps({"weight_map": {"x": "a.safetensors"}}).encode()
    refused(CorruptCheckpoint, "org/evil")
    index.beginning = json.dumps({"weight_map": {"x": "b.safetensors"}}).encode()
    refused(CorruptCheckpoint, "org/evil")


def test_broken_files(hub: StandInHub) -> None:
    hub.add_model("org/broken", CONFIG, {"model.safetensors": header_of(LAYER)})
    weights = hub.files["org/broken/model.safetensors"]
    weights.beginning = (10**12).to_bytes(8, "little") + weights.beginning[8:]
    refused(CorruptCheckpoint, "org/broken")
    hub.files["org/broken/config.json"].beginning = b"<html>"
    refused(CorruptCheckpoint, "org/broken")


def test_a_quantized_model_is_refused_before_its_weights_are_looked_at(hub: StandInHub) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "gptq"}}
    hub.add_model("org/gptq", config, {"model.safetensors": header_of(LAYER)})
    refused(AlreadyQuantized, "org/gptq")
    assert hub.served(".safetensors") == 0


def test_no_hub_at_all(tmp_path: Path) -> None:
    nowhere = StandInHub(endpoint="http://127.0.0.1:9")
    done = loftq_process(nowhere, tmp_path, "targets", "-m", "org/name")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[1] == "error: the hub did not answer about 'org/name'"
    assert "Traceback" not in done.stderr
