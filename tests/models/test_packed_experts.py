"""`loftq_cli.load`: experts in bitsandbytes' 4 bits stay packed, and are what the files hold."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, replace_parameter_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.errors import CorruptCheckpoint, UnsupportedModel
from loftq_cli.models.adapters import attach_adapter
from loftq_cli.models.loading import logical_parameters
from tests.experts import (
    NAMES,
    Place,
    experts_of,
    matrices_in,
    relative,
    save,
    takes_a_step,
    tokens,
)

Made = Callable[[str], tuple[Any, Path]]
STACK = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A mixture of this name, and its directory with all experts quantized, made once."""
    known: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in known:
            directory = tmp_path_factory.mktemp("packed")
            original = save(name, directory / "source")
            loftq_cli.quantize(
                str(directory / "source"), output=directory / "out", experts="quantize", rank=4,
                iterations=1, double_quant=name == "Mixtral",
            )  # fmt: skip
            known[name] = original, directory / "out"
        return known[name]

    return make


def dequantized(directory: Path) -> dict[str, torch.Tensor]:
    """The weights of a directory, those in codes by bitsandbytes itself, each alone."""
    tensors = load_file(directory / "model.safetensors")
    packed = [name.removesuffix(".absmax") for name in tensors if name.endswith(".weight.absmax")]
    plain = {}
    for name in packed:
        beside = {each: tensors.pop(each) for each in list(tensors) if each.startswith(f"{name}.")}
        state = QuantState.from_dict(beside, torch.device("cpu"))
        plain[name] = dequantize_4bit(tensors.pop(name), state)
    return {**tensors, **plain}


def same_experts(model: Any, directory: Path, dtype: torch.dtype) -> None:
    weights, held = dequantized(directory), experts_of(model)
    stored: dict[Place, str] = dict(matrices_in(weights, ".weight"))
    assert stored.keys() == held.keys()
    for place, name in stored.items():
        assert torch.equal(held[place], weights[f"{name}.weight"].to(dtype)), place


def scales(model: Any) -> int:
    """Bytes of what lies beside the codes of experts."""
    found = [each for each in model.modules() if isinstance(each, Bnb4bitParametrization)]
    return sum(each.quant_state.absmax.nbytes for each in found)


@pytest.mark.parametrize("name", NAMES)
def test_packed_and_the_same_to_the_bit(name: str, made: Made) -> None:
    original, directory = made(name)
    model: Any = loftq_cli.load(directory)
    base = model.get_base_model()
    assert type(base.model) is type(original.model)
    same_experts(base, directory, torch.float32)

    weights = sum(each.numel() for each in experts_of(original).values())
    packed = [each for name, each in base.named_parameters() if ".mlp.experts." in name]
    assert sum(each.nbytes for each in packed) == weights // 2
    assert scales(base) == weights // 64 * 4
    adapters = sum(each.numel() for name, each in model.named_parameters() if ".lora_" in name)
    parameters = sum(each.numel() for each in original.parameters())
    assert logical_parameters(model) == parameters + adapters

    plain = type(original).from_pretrained(
        None, config=original.config, state_dict=dequantized(directory)
    )
    with torch.no_grad():
        expected = attach_adapter(plain, directory / "loftq_init").eval()(tokens()).logits
        assert relative(model(tokens()).logits, expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_trained_saved_and_loaded_again(name: str, made: Made, tmp_path: Path) -> None:
    _, directory = made(name)
    model: Any = loftq_cli.load(directory, trainable=True)
    adapter = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapter == {name for name, each in model.named_parameters() if each.requires_grad}
    before = {name: each.clone() for name, each in model.named_parameters()}
    model.train()
    new = hasattr(model, "activation_checkpointing_enable")  # transformers 5.24
    (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)()
    takes_a_step(model)
    for name, each in model.named_parameters():
        assert torch.equal(each, before[name]) is (name not in adapter), name
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == str(directory)
    again: Any = loftq_cli.load(directory, adapter=tmp_path)
    assert not any(each.requires_grad for each in again.parameters())
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model.eval()(tokens()).logits)


def test_computed_in_another_dtype_than_stored(made: Made) -> None:
    """Q is what the dtype of the files rounds it to, whatever it is multiplied in."""
    _, directory = made("Qwen3-MoE")
    model: Any = loftq_cli.load(directory, dtype="bfloat16")
    same_experts(model.get_base_model(), directory, torch.bfloat16)
    with torch.no_grad():
        first, second = model(tokens()).logits, model(tokens()).logits
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, second)


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = torch.nn.Parameter(torch.randn(4, 64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.stack


class Mixture(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.experts(x))


def on_experts(stack: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=[], target_parameters=[stack], init_lora_weights=False)


@pytest.mark.filterwarnings("ignore:Could not find any LoRA parametrization")
def test_what_peft_does_on_a_parametrized_parameter() -> None:
    """The fault that is guarded against; without a parametrization there is none."""
    x = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0))
    for packed in (False, True):
        mixture = Mixture()
        if packed:
            replace_parameter_4bit(mixture.experts, "stack")
        adapted = get_peft_model(mixture, on_experts("experts.stack"))
        with torch.no_grad():
            outputs = [adapted(x) for _ in range(3)]
        assert torch.equal(outputs[0], outputs[1]) is not packed
        assert torch.equal(outputs[1], outputs[2]) is not packed


def test_adapters_on_packed_experts_are_refused(made: Made, tmp_path: Path) -> None:
    _, directory = made("Mixtral")
    model: Any = loftq_cli.load(directory)
    adapted = get_peft_model(model.unload(), on_experts(STACK))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own of what it leaves
        adapted(tokens())
        with pytest.raises(UnsupportedModel, match="would be added 2 times"):
            adapted(tokens())
    adapted.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="is on experts, and those of this model stay pack"):
        loftq_cli.load(directory, adapter=tmp_path)


def damaged(directory: Path, output: Path, end: str, change: Callable[..., Any]) -> Path:
    """A copy of the directory in which one tensor of one expert is another, or gone."""
    shutil.copytree(directory, output)
    tensors = load_file(output / "model.safetensors")
    name = f"model.layers.1.mlp.experts.2.up_proj.weight.{end}"
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return output


@pytest.mark.parametrize(
    ("end", "change", "kind", "message"),
    [
        ("absmax", lambda _: None, UnsupportedModel, "cannot be put together"),
        ("absmax", lambda scales: scales[:-1].clone(), CorruptCheckpoint, "is damaged"),
        ("quant_map", lambda _: None, CorruptCheckpoint, "is damaged"),
    ],
)
def test_what_is_not_whole_is_refused(
    end: str,
    change: Callable[..., Any],
    kind: type[Exception],
    message: str,
    made: Made,
    tmp_path: Path,
) -> None:
    directory = damaged(made("Qwen3-MoE")[1], tmp_path / "out", end, change)
    with pytest.raises(kind, match=message):
        loftq_cli.load(directory)


def test_its_readme_loads_it(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    _, directory = made("DeepSeek-V3")
    text = (directory / "README.md").read_text("utf-8")
    start = text.index("import loftq_cli")
    monkeypatch.chdir(directory.parent)
    scope: dict[str, Any] = {}
    exec(text[start : text.index("```", start)], scope)
    with torch.no_grad():
        assert scope["model"](tokens()).logits.isfinite().all()
