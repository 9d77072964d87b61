"""Directories of integer codes, loaded with no library of theirs: as if stored dequantized."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.containers.base import Container
from loftq_cli.containers.compressed_tensors import CompressedTensors
from loftq_cli.containers.gptq import Gptq
from loftq_cli.core.integers import dequantize_integers
from loftq_cli.errors import CorruptCheckpoint
from loftq_cli.models import dequantized
from loftq_cli.models.architecture import read_architecture
from loftq_cli.models.dequantized import integer_codes
from loftq_cli.models.finetuning import Schedule, finetune
from loftq_cli.models.loading import load_model, logical_parameters
from loftq_cli.models.source import read_config
from tests.battery import BATTERY
from tests.conftest import Outcome
from tests.containers.integer_models import Written, tokens, write_model

KINDS = [Gptq, CompressedTensors]
MIXED = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 8, "gate_proj": 4, "up_proj": 4,
         "down_proj": 3}  # fmt: skip


def load(directory: Path, dtype: str = "bfloat16") -> Any:
    return load_model(directory, device="cpu", dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bits", "block_size", "dtype"),
    [(2, 32, "bfloat16"), (3, -1, "float32"), (8, 128, "float32"), (MIXED, 64, "bfloat16")],
)
def test_the_model_is_that_of_the_dequantized_weights(
    kind: type[Container],
    bits: int | Mapping[str, int],
    block_size: int,
    dtype: str,
    tmp_path: Path,
) -> None:
    written = write_model(tmp_path / "codes", kind("int", block_size), bits, torch.bfloat16)
    written.dequantized().save_pretrained(tmp_path / "plain")
    loaded, plain = load(tmp_path / "codes", dtype), load(tmp_path / "plain", dtype)
    found, expected = loaded.model.state_dict(), plain.model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == getattr(torch, dtype)
        assert torch.equal(found[name], tensor), name
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens()).logits, plain.model(tokens()).logits)
    assert loaded.model.generation_config == plain.model.generation_config
    assert logical_parameters(loaded.model) == logical_parameters(plain.model)
    assert loaded.codes is not None
    assert {each.module: each.bits for each in loaded.codes.weights} == {
        module: each.format.bits for module, each in written.quantized.items()
    }
    assert plain.codes is None


def test_layers_that_hold_in_by_out(loftq: Callable[..., Outcome], tmp_path: Path) -> None:
    """The built-in model, whose layers are Conv1D, with its adapter; `load` says what it is."""
    out = tmp_path / "out"
    done = loftq("quantize", "-o", out, "--container", "gptq", "--bits", "8x2,3", "--rank", 4,
                 "--iterations", 1)  # fmt: skip
    assert done.code == 0, done.err
    loaded = load(out, "float32")
    assert loaded.adapter == "loftq_init"
    checkpoint = open_checkpoint(out)
    assert loaded.codes is not None
    for weight in loaded.codes.weights:
        container = loaded.codes.container
        Q = dequantize_integers(
            container.quantized(container.read(checkpoint.tensors, weight, "cpu"))
        )
        assert weight.transposed
        module = loaded.base.get_submodule(weight.module)
        assert torch.equal(module.base_layer.weight, Q.t().float())

    told = json.loads(loftq("load", "-m", out, "--json").out)["results"]
    assert told["quantization"] == "gptq"
    assert told["quantized_layers"] == 16
    assert told["dequantized"] is True
    assert told["parameters"] == 4_273_664
    assert told["bytes_by_dtype"]["bfloat16"] == 2 * 4_273_664
    assert "gptq, 16 quantized layers, dequantized" in loftq("load", "-m", out, "--format",
                                                             "table").out  # fmt: skip
    written = loftq("generate", "-m", out, "--prompt", "def f(", "--max-new-tokens", 3)
    assert written.code == 0, written.err


def test_weights_are_dequantized_when_their_turn_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, Gptq("int", 64), 4, torch.bfloat16)
    config, checkpoint = read_config(tmp_path), open_checkpoint(tmp_path)
    architecture = read_architecture(tmp_path, config, trust_remote_code=False)
    codes = integer_codes(architecture, config, checkpoint)
    assert codes is not None
    asked: list[str] = []
    runtime = Gptq.runtime

    def noting(self: Gptq, stored: Any) -> torch.Tensor:
        asked.append(stored.weight.name)
        return runtime(self, stored)

    monkeypatch.setattr(Gptq, "runtime", noting)
    with codes.state_dict(checkpoint) as state:
        assert not asked
        one = codes.weights[0].name
        assert state[one][...].shape == codes.weights[0].shape
        assert asked == [one]


def test_an_adapter_is_trained_over_it_and_nothing_else(
    loftq: Callable[..., Outcome], tmp_path: Path
) -> None:
    BATTERY["llama"].build().save_pretrained(tmp_path / "source")
    done = loftq("quantize", "-m", tmp_path / "source", "-o", tmp_path / "out", "--container",
                 "compressed-tensors", "--bits", 2, "--rank", 4, "--iterations", 1)  # fmt: skip
    assert done.code == 0, done.err
    model = load(tmp_path / "out", "float32").model
    before = {name: each.clone() for name, each in model.named_parameters()}
    windows = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    trained = finetune(model, windows, windows, Schedule(12, 5e-3, 0))
    assert trained.after is not None
    assert trained.after.loss < trained.quarter.loss
    for name, each in model.named_parameters():
        assert torch.equal(each, before[name]) == ("lora_" not in name), name


@pytest.fixture
def codes(tmp_path: Path) -> Written:
    return write_model(tmp_path / "codes", CompressedTensors("int", 64), 4, torch.bfloat16)


def _change(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_weight_that_is_missing_is_no_random_one(codes: Written) -> None:
    _change(codes.directory, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CorruptCheckpoint, match="lacks weights"):
        load(codes.directory)


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape"])
def test_codes_without_what_belongs_to_them_are_refused(codes: Written, part: str) -> None:
    name = f"model.layers.1.mlp.up_proj.{part}"
    _change(codes.directory, lambda tensors: tensors.pop(name))
    with pytest.raises(CorruptCheckpoint) as raised:
        load(codes.directory)
    assert name in str(raised.value.cause)


def test_codes_of_other_programs_are_for_their_libraries(
    codes: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With zero points, say: they are not multiplied by their scales alone."""
    config = json.loads((codes.directory / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights["symmetric"] = False
    (codes.directory / "config.json").write_text(json.dumps(config))
    found: list[object] = []
    original = dequantized.integer_codes
    monkeypatch.setattr(
        "loftq_cli.models.loading.integer_codes",
        lambda *given: found.append(original(*given)),
    )
    with suppress(CorruptCheckpoint):  # unless such a library is here
        load(codes.directory)
    assert found == [None]
