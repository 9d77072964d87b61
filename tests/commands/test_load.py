"""`loftq load`: what it counts, what it says of every choice, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loftq_cli.models.spec import DEMO_DIRECTORY
from tests.battery import BATTERY
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]
Documents = Callable[..., dict[str, Any]]
Refused = Callable[..., str]

PARAMETERS = 4_273_664


def test_the_built_in_model(document: Documents) -> None:
    data = document("load")
    results = data["results"]
    assert results["architecture"] == "GPT2LMHeadModel"
    assert results["parameters"] == PARAMETERS
    assert results["bytes_by_dtype"] == {"bfloat16": 2 * PARAMETERS}
    assert results["parameter_bytes"] == 2 * PARAMETERS
    assert results["vocabulary_size"] == 4096
    assert (results["device"], results["dtype"]) == ("cpu", "bfloat16")
    assert results["adapter"] is results["quantization"] is None
    assert results["random_weights"] is False
    assert 100e6 < results["peak_memory_bytes"] < 20e9
    for name in ("device", "dtype"):
        assert data["resolved"][name]["value"] == results[name]
        assert data["resolved"][name]["reason"].startswith("auto: ")
    timings = data["timings_seconds"]
    assert set(timings) == {"resolve", "import", "build", "read", "total"}
    spent = timings["resolve"] + timings["build"] + timings["read"]
    assert results["load_seconds"] == pytest.approx(spent)


def test_dtype_and_device_that_are_asked_for(document: Documents, refused: Refused) -> None:
    data = document("load", "--dtype", "float32", "--device", "cpu")
    assert data["results"]["bytes_by_dtype"] == {"float32": 4 * PARAMETERS}
    assert data["resolved"]["dtype"] == {"value": "float32", "reason": "asked for"}
    assert "there is no device 'tpu'" in refused("load", "--device", "tpu", code=2)


def test_a_quantized_directory_brings_its_adapter(quantized: Path, document: Documents) -> None:
    results = document("load", "--model", quantized)["results"]
    assert results["parameters"] == PARAMETERS
    assert results["quantization"] == "bitsandbytes"
    assert results["quantized_layers"] == 16
    assert results["adapter"] == "loftq_init"
    assert results["adapter_parameters"] == 131_072
    assert results["bytes_by_dtype"]["uint8"] == 3_145_728 // 2
    assert results["bytes_by_dtype"]["float32"] == 4 * 131_072


def test_a_head_that_is_trained_too_is_part_of_the_adapter(
    tmp_path: Path, loftq: Loftq, document: Documents
) -> None:
    model = BATTERY["bert"].build()
    model.save_pretrained(tmp_path / "bert")
    out = tmp_path / "out"
    done = loftq("quantize", "-m", tmp_path / "bert", "-o", out, "--rank", 4, "--iterations", 1)
    assert done.code == 0, done.err
    results = document("load", "--model", out)["results"]
    assert results["parameters"] == model.num_parameters()
    assert results["tokenizer"] is results["vocabulary_size"] is None
    head = 3 * 64 + 3
    assert results["adapter_parameters"] % 4 == head % 4, "the head beside A and B of rank 4"


# --- --expect -----------------------------------------------------------------------------------


def test_expect(loftq: Loftq) -> None:
    done = loftq("load", "--expect", "cuda", "--json")
    assert done.code == 3
    assert json.loads(done.out)["results"]["device"] == "cpu"
    error, cause = done.err.splitlines()[-2:]
    assert error == "error: expected cuda, and the model is on cpu"
    assert cause.startswith("cause: auto: ")
    assert loftq("load", "--expect", "cpu").code == 0


@pytest.mark.slow
def test_expect_in_a_pipe_of_commands() -> None:
    """The exit code keeps what follows from running; nothing but ours is on stderr."""
    line = f"{sys.executable} -m loftq_cli load -m demo --expect cuda && echo trained"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 3
    assert "trained" not in done.stdout
    header, record = done.stdout.splitlines()
    assert header.startswith("architecture\tparameters\t")
    assert record.startswith(f"GPT2LMHeadModel\t{PARAMETERS}\t")
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "cause"]


# --- --random-weights ---------------------------------------------------------------------------


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    directory = tmp_path / "config-only"
    directory.mkdir()
    shutil.copy(DEMO_DIRECTORY / "config.json", directory)
    return directory


def test_a_config_is_enough(config_only: Path, document: Documents, refused: Refused) -> None:
    data = document("load", "--model", config_only, "--random-weights")
    results = data["results"]
    assert results["parameters"] == PARAMETERS
    assert results["random_weights"] is True
    assert results["tokenizer"] is None
    assert (data["model"]["source"], results["dtype"]) == ("directory", "bfloat16")
    assert "read" not in data["timings_seconds"]
    assert "holds no model" in refused("load", "--model", config_only)


def test_a_known_model_needs_no_network(
    document: Documents, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = document("load", "--model", "gpt2", "--random-weights")
    assert data["results"]["parameters"] == 124_439_808
    assert data["model"] == {"id": "gpt2", "revision": None, "source": "known"}
    assert data["results"]["bytes_by_dtype"] == {"float32": 4 * 124_439_808}
    error = refused("load", "--model", "gpt2-medium", "--random-weights")
    assert "'gpt2-medium' cannot be built without its config" in error
    assert "hint: give a directory that has its config.json" in error


def test_a_quantized_config_has_no_random_weights(quantized: Path, refused: Refused) -> None:
    error = refused("load", "--model", quantized, "--random-weights")
    assert "a quantized model cannot have random weights" in error


# --- broken models ------------------------------------------------------------------------------


def test_a_truncated_file(demo: Path, refused: Refused) -> None:
    weights = demo / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    error = refused("load", "--model", demo)
    assert f"error: {weights} cannot be used" in error
    assert "cause: it is truncated" in error


def test_a_missing_weight_is_not_made_up(demo: Path, refused: Refused) -> None:
    weights = demo / "model.safetensors"
    tensors = load_file(weights)
    missing = next(name for name in tensors if name.endswith("h.1.mlp.c_fc.weight"))
    del tensors[missing]
    save_file(tensors, weights, metadata={"format": "pt"})
    error = refused("load", "--model", demo)
    assert f"error: {demo} lacks weights of GPT2LMHeadModel" in error
    assert "cause: 1 not found in its files, the first of them " in error
    assert "h.1.mlp.c_fc.weight" in error


def test_a_broken_tokenizer(demo: Path, refused: Refused) -> None:
    (demo / "tokenizer.json").write_text('{"version": "1.0", "model": 7}')
    assert f"error: the tokenizer in {demo} cannot be loaded" in refused("load", "--model", demo)


def test_an_adapter_of_another_model(quantized: Path, tmp_path: Path, refused: Refused) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(quantized, mixed)
    config = json.loads((mixed / "loftq_init" / "adapter_config.json").read_text())
    config["target_modules"] = [*config["target_modules"], "wpe"]
    (mixed / "loftq_init" / "adapter_config.json").write_text(json.dumps(config))
    error = refused("load", "--model", mixed)
    assert f"error: the adapter in {mixed / 'loftq_init'} does not fit this model" in error
    assert "of its tensors are missing" in error
