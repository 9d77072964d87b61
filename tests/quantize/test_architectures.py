"""Every architecture of the battery: quantized, loaded by the libraries alone, and run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch

from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.models.architecture import read_architecture
from loftq_cli.models.layers import linear_layers
from loftq_cli.models.source import read_config
from tests.battery import BATTERY
from tests.conftest import Outcome
from tests.reload import relative_error, reload, weights

CAN = [name for name, entry in BATTERY.items() if entry.cannot is None]
CANNOT = [name for name, entry in BATTERY.items() if entry.cannot is not None]


# One of each kind; its like is slow, and in the zoo.
_ALIKE = {"mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt", "gpt_neox", "bloom", "bart"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in _ALIKE else ()) for name in CAN],
)
def test_quantized_model_loads_and_runs(
    name: str, tmp_path: Path, loftq: Callable[..., Outcome]
) -> None:
    entry = BATTERY[name]
    original = entry.build()
    original.save_pretrained(tmp_path / "source")
    with torch.no_grad():
        expected = original(**entry.inputs()).logits

    outcome = loftq("quantize", "-m", tmp_path / "source", "-o", tmp_path / "out", "--json",
                    "--rank", 8, "--iterations", 2)  # fmt: skip
    assert outcome.code == 0, outcome.err
    results = json.loads(outcome.out)["results"]

    reloaded = reload(tmp_path / "out", entry.model_class)
    reported = {layer["name"]: layer for layer in results["layers"]}
    assert set(reloaded.dequantized) == set(reloaded.correction) == set(reported)
    for module, W in weights(original).items():
        if module not in reported:
            continue
        Q, correction = reloaded.dequantized[module], reloaded.correction[module]
        error = relative_error(W, Q + correction)
        assert error == pytest.approx(reported[module]["weight_error_relative"], abs=1e-5)
        assert error < relative_error(W, Q)

    with torch.no_grad():
        # Dropout is off and the base is 4-bit: what differs is quantization and nothing else.
        actual = reloaded.model(**entry.inputs()).logits
    assert actual.shape == expected.shape
    assert relative_error(expected.double(), actual.double()) < 0.35


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_work_says_why(
    name: str, tmp_path: Path, loftq: Callable[..., Outcome]
) -> None:
    entry = BATTERY[name]
    entry.build().save_pretrained(tmp_path / "source")
    outcome = loftq("quantize", "-m", tmp_path / "source", "-o", tmp_path / "out")
    assert (outcome.code, outcome.out) == (1, "")
    assert entry.cannot is not None
    assert entry.cannot in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", BATTERY)
def test_names_alone_tell_what_the_model_class_tells(name: str, tmp_path: Path) -> None:
    """The dry run reads names and shapes; the run itself asks the class. They must agree."""
    BATTERY[name].build().save_pretrained(tmp_path)
    config = read_config(tmp_path)
    tensors = [info for _, info in open_checkpoint(tmp_path).tensors.values()]
    architecture = read_architecture(tmp_path, config, trust_remote_code=False)
    from_class, from_names = architecture.inventory(tensors), linear_layers(tensors, config)
    assert [(e.tensor, getattr(e, "transposed", None)) for e in from_class.entries] == [
        (e.tensor, getattr(e, "transposed", None)) for e in from_names.entries
    ]
    assert {e.tensor for e in from_class.layers} == {e.tensor for e in from_names.layers}


def test_every_linear_module_is_quantized_or_skipped(
    tmp_path: Path, loftq: Callable[..., Outcome]
) -> None:
    """A biased head is where transformers' own skip list goes wrong."""
    original = BATTERY["bert"].build()
    original.save_pretrained(tmp_path / "source")
    outcome = loftq("quantize", "-m", tmp_path / "source", "-o", tmp_path / "out", "--rank", 4)
    assert outcome.code == 0, outcome.err
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "classifier" in config["quantization_config"]["llm_int8_skip_modules"]
    model = reload(tmp_path / "out", "BertForSequenceClassification").model
    linear = {
        type(module)
        for name, module in model.named_modules()
        if name.endswith(("base_layer", "classifier.original_module"))
    }
    assert bnb.nn.Linear4bit in linear
    head = model.base_model.model.get_submodule("classifier")
    stored = next(module for module in head.modules() if isinstance(module, torch.nn.Linear))
    assert torch.equal(stored.weight, original.classifier.weight)


def test_experts_are_left_and_said_so(tmp_path: Path, loftq: Callable[..., Outcome]) -> None:
    """By default, in bitsandbytes: with the gigabytes, before any weight is read."""
    BATTERY["mixtral"].build().save_pretrained(tmp_path / "source")
    outcome = loftq("quantize", "-m", tmp_path / "source", "--dry-run", "--json")
    untouched = json.loads(outcome.out)["results"]["untouched"]
    experts = [tensor for tensor in untouched if "an expert" in tensor["reason"]]
    assert len(experts) == 2 * 4 * 3  # layers × experts × (w1, w2, w3)
    assert sum(tensor["bytes"] for tensor in experts) == 2 * 4 * 3 * 64 * 128 * 4
    assert "24 matrices with 83.9 % of the parameters stay as they are, 786 kB" in outcome.err
