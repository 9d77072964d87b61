"""What is done to models before and while they are trained keeps the start that was written.

The README of a directory has what to do about pipelines, references and what `disable_adapter`
gives; `tests/quantize/test_card.py` runs that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    prepare_model_for_kbit_training,
)
from transformers import AutoModelForCausalLM

from loftq_cli.models.loading import keep_layout
from loftq_cli.models.spec import DEMO_DIRECTORY
from tests.battery import BATTERY
from tests.conftest import Outcome
from tests.reload import relative_error, take_apart, weights

Loftq = Callable[..., Outcome]
FORMS = {
    "uint8": (),
    "bfloat16": ("--quant-storage", "bfloat16", "--adapter-dtype", "bfloat16"),
}
TOKENS = torch.arange(2 * 16).reshape(2, 16) * 7 % 4000 + 5


@pytest.fixture(scope="module")
def original() -> Any:
    """The demo model in float32: its weights, and its outputs."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_DIRECTORY, dtype=torch.float32).eval()
    return weights(model), logits(model)


@pytest.fixture(scope="module", params=FORMS)
def out(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, loftq: Loftq
) -> Path:
    """The demo model with a start that corrects much: without it errors would show."""
    directory = tmp_path_factory.mktemp("libraries") / "OUT"
    line = ("quantize", "-o", directory, "--rank", 8, "--init", "pissa", "--iterations", 1)
    done = loftq(*line, *FORMS[request.param])
    assert done.code == 0, done.err
    return directory


def backbone(out: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(out)
    keep_layout(model)
    return model


def adapted(model: Any, out: Path) -> Any:
    """As the README in ``out`` has it."""
    keeps = "autocast_adapter_dtype=False" in (out / "README.md").read_text()
    return PeftModel.from_pretrained(
        model,
        out,
        subfolder="loftq_init",
        is_trainable=True,
        **({"autocast_adapter_dtype": False} if keeps else {}),
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return found.float()


def require_start(model: Any, out: Path, original: Any) -> None:
    """Every layer's error is the report's, and the outputs are as near as the start's are."""
    before, expected = original
    dequantized, correction = take_apart(model)
    report = json.loads((out / "loftq_report.json").read_text())["results"]
    assert len(report["layers"]) == len(correction) > 0
    for layer in report["layers"]:
        name = layer["name"]
        error = relative_error(before[name], dequantized[name] + correction[name])
        assert error == pytest.approx(layer["weight_error_relative"], abs=1e-6)
    assert relative_error(expected, logits(model)) < 0.08
    with model.disable_adapter():
        assert relative_error(expected, logits(model)) > 0.16


def gradients(model: Any, computed: Any = None) -> dict[str, torch.Tensor]:
    """Of every A and B; there is none for anything else.

    ``computed`` is the model in another form, where that is asked.
    """
    model.train()
    model.zero_grad()
    tokens = TOKENS % model.config.vocab_size
    (model if computed is None else computed)(input_ids=tokens, labels=tokens).loss.backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert found.keys() == {name for name, _ in model.named_parameters() if "lora_" in name}
    return {name: each.float().clone() for name, each in found.items()}


def require_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def test_as_it_is(out: Path, original: Any) -> None:
    require_start(adapted(backbone(out), out), out, original)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_prepare_model_for_kbit_training(out: Path, original: Any) -> None:
    """It makes float32 of all that is in 16 bits, and must not take codes for that."""
    model = prepare_model_for_kbit_training(
        backbone(out), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert model.transformer.ln_f.weight.dtype == torch.float32
    assert model.is_gradient_checkpointing
    model = adapted(model, out)
    require_start(model, out, original)
    assert all(bool(each.isfinite().all()) for each in gradients(model).values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing(out: Path, reentrant: bool) -> None:
    model = adapted(backbone(out), out)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    require_same(gradients(model), expected)


def test_the_adapter_names_its_base_for_auto_classes(
    out: Path, original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)  # by the name alone: where there is another, it is taken
    model = AutoPeftModelForCausalLM.from_pretrained(out / "loftq_init")
    require_start(model, out, original)


def test_a_second_adapter_beside_the_first(out: Path, original: Any) -> None:
    model = adapted(backbone(out), out)
    start = logits(model)
    # One that PEFT begins anew is on the backbone alone.
    targets = list(model.peft_config["default"].target_modules)
    model.add_adapter("fresh", LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    model.set_adapter("fresh")
    with model.disable_adapter():
        alone = logits(model)
    assert torch.equal(logits(model), alone)
    assert not torch.equal(start, alone)
    # The start, loaded again, is one to train for another task.
    model.load_adapter(out, "second", subfolder="loftq_init", is_trainable=True)
    model.set_adapter("second")
    require_start(model, out, original)
    for name, parameter in model.named_parameters():
        if ".second." in name:
            assert parameter.requires_grad
            parameter.data += 0.1
    assert not torch.equal(logits(model), start)
    model.set_adapter("default")
    require_start(model, out, original)
    assert torch.equal(logits(model), start)


def test_saved_and_loaded_again(out: Path, original: Any, tmp_path: Path) -> None:
    model = adapted(backbone(out), out)
    model.peft_config["default"].base_model_name_or_path = str(out)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(backbone(out), tmp_path / "adapter", is_trainable=True)
    require_start(again, out, original)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    require_start(again, out, original)


COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.parametrize(
    ("backend", "tolerance"),
    [
        ("eager", 0.0),  # what is compiled, by torch itself
        pytest.param(
            "inductor",
            0.05,  # kernels that round less often
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
            ],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of torch
def test_compiled(backend: str, tolerance: float, tmp_path: Path, loftq: Loftq) -> None:
    config = BATTERY["llama"].settings()
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "in")
    line = ("quantize", "-m", tmp_path / "in", "-o", tmp_path / "out", "--rank", 4)
    assert loftq(*line, "--iterations", 1, *FORMS["bfloat16"]).code == 0
    model = adapted(backbone(tmp_path / "out"), tmp_path / "out")
    expected = gradients(model)
    torch._dynamo.reset()
    found = gradients(model, torch.compile(model, backend=backend, fullgraph=True))
    for name, gradient in expected.items():
        assert relative_error(gradient, found[name]) <= tolerance, name
    torch._dynamo.reset()
