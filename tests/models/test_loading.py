"""What may be done with a loaded model, and in which order: anything, in any."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, modules

from loftq_cli.models.adapters import attach_adapter
from loftq_cli.models.loading import load_model
from tests.battery import BATTERY, text_inputs
from tests.conftest import Outcome


@pytest.fixture(scope="module")
def written(loftq: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loading")
    BATTERY["llama"].build().save_pretrained(directory / "source")
    outcome = loftq("quantize", "-m", directory / "source", "-o", directory / "out", "--rank", 4,
                    "--iterations", 1)  # fmt: skip
    assert outcome.code == 0, outcome.err
    return directory / "out"


@pytest.fixture
def native_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with native bfloat16, as far as bitsandbytes' layers can see."""
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)


def load(directory: Path, adapter: Path | None = None) -> Any:
    return load_model(directory, device="cpu", dtype="float32", adapter=adapter).model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**text_inputs()).logits
    return found


def step(model: Any) -> None:
    """One step of training, large enough to be seen."""
    tokens = text_inputs()["input_ids"]
    trained = [p for n, p in model.named_parameters() if "lora_" in n]
    for parameter in trained:
        parameter.requires_grad_()
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.SGD(trained, lr=1.0).step()


@pytest.mark.usefixtures("native_bfloat16")
def test_what_bitsandbytes_would_do_there(written: Path) -> None:
    """Without this the tests below could not fail."""
    model = load(written)
    layers = [each for each in model.modules() if isinstance(each, Linear4bit)]
    assert layers
    assert Linear4bit(64, 64).support_avx512bf16_for_cpu
    before = layers[0].weight.data.clone()
    logits(model)
    assert torch.equal(layers[0].weight.data, before)
    layers[0].support_avx512bf16_for_cpu = True
    logits(model)
    assert layers[0].weight.data.shape != before.shape


@pytest.mark.usefixtures("native_bfloat16")
def test_forward_wrap_train_save_and_load_again(written: Path, tmp_path: Path) -> None:
    """Each with a forward pass before it, held against the straight way."""
    adapter = written / "loftq_init"
    straight = load(written)
    expected = logits(load(written))
    backbone = straight.unload()
    logits(backbone)
    wrapped = attach_adapter(backbone, adapter).eval()
    assert torch.equal(logits(wrapped), expected)
    assert torch.equal(logits(copy.deepcopy(wrapped)), expected)

    step(wrapped)
    trained = logits(wrapped)
    other = load(written)
    step(other)
    assert torch.equal(logits(other), trained)
    assert not torch.allclose(trained, expected, atol=1e-3)

    step(wrapped)  # after an evaluation again
    trained = logits(wrapped)
    wrapped.peft_config["default"].base_model_name_or_path = str(written)
    wrapped.save_pretrained(tmp_path / "trained")
    assert torch.equal(logits(load(written, tmp_path / "trained")), trained)

    saved = wrapped.unload()
    saved.save_pretrained(tmp_path / "backbone", save_original_format=False)
    assert torch.equal(logits(load(tmp_path / "backbone", tmp_path / "trained")), trained)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_layers_compute_in_the_dtype_that_was_asked_for(
    written: Path, tmp_path: Path, dtype: str
) -> None:
    """Whatever config.json names: here it is the other one."""
    shutil.copytree(written, tmp_path / "out")
    config = json.loads((written / "config.json").read_text())
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    config["quantization_config"]["bnb_4bit_compute_dtype"] = other
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    model = load_model(tmp_path / "out", device="cpu", dtype=dtype).model
    layer = next(each for each in model.modules() if isinstance(each, Linear4bit))
    kind = getattr(torch, dtype)
    inputs = torch.randn(5, layer.in_features, dtype=kind, generator=torch.manual_seed(0))
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(kind)
    with torch.no_grad():
        found, expected = layer(inputs), torch.nn.functional.linear(inputs, weight)
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert layer.compute_dtype == kind
    assert torch.equal(logits(model), logits(model))
