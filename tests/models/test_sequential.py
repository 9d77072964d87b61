"""Inputs that quantized layers leave, against plain models whose earlier layers were replaced."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import loftq_cli
from loftq_cli.core.input_moments import Drift
from loftq_cli.models import calibration, layerwise
from loftq_cli.models.calibration import Calibration, open_calibration
from loftq_cli.models.quantized_layers import QuantizedLayer
from tests.battery import BATTERY, Entry

DEMO = Path(loftq_cli.__file__).parent / "demo"
# GPT-2 has Conv1D, OPT a layer before its blocks, DeBERTa layers that are called twice.
MODELS = ["llama", "gpt2", "t5", "opt", "deberta_v2", "mixtral"]
SCALING, RANK, LENGTH = 0.5, 3, 16


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_PAIRED_TOKENS", 3 * LENGTH)  # 3, 3 and 1 windows


def build(name: str) -> Any:
    entry = BATTERY[name]
    model = Entry(entry.model_class, entry.config_class, {**entry.config}).build()
    model.config.use_cache = False
    # Biases are zero in a new model, and would not be missed.
    generator = torch.Generator().manual_seed(1)
    for each, parameter in model.named_parameters():
        if each.endswith(".bias"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def linear_modules(model: nn.Module) -> list[str]:
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]


def windows(vocabulary: int = 90) -> Tensor:
    ids = torch.randint(4, vocabulary, (7, LENGTH), generator=torch.Generator().manual_seed(2))
    return ids


def quantized(model: nn.Module) -> Callable[[str], QuantizedLayer]:
    """Layers as far from the original's as those of two bits are; every third has no adapter."""
    names = linear_modules(model)
    layers = {}
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(number)
        module: Any = model.get_submodule(name)
        W = module.weight.detach()
        W = W.t() if isinstance(module, Conv1D) else W
        Q = W + 0.2 * W.std() * torch.randn(W.shape, generator=generator)
        A = torch.randn(RANK, W.shape[1], generator=generator) * 0.1
        B = torch.randn(W.shape[0], RANK, generator=generator) * 0.1
        layers[name] = QuantizedLayer(Q.contiguous(), None if number % 3 == 2 else (A, B), SCALING)
    return layers.__getitem__


def replaced(model: Any, modules: list[str], get: Callable[[str], QuantizedLayer]) -> Any:
    """A copy of the model in which these modules have their quantized layers' weights."""
    changed = copy.deepcopy(model)
    for name in modules:
        layer, module = get(name), changed.get_submodule(name)
        W = layer.Q
        if layer.adapter is not None:
            A, B = layer.adapter
            W = W + layer.scaling * B @ A
        module.weight.data = W.t().contiguous() if isinstance(module, Conv1D) else W
    return changed


def seen(model: Any, modules: list[str], ids: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs of every call of these modules, in an ordinary forward pass."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}

    def hook(name: str) -> Callable[..., None]:
        def see(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            x = (args or tuple(kwargs.values()))[0]
            found[name].append((x.clone().double(), output.clone().double()))

        return see

    handles = [
        model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
        for name in modules
    ]
    with torch.no_grad():
        for batch in ids.split(3):
            more = {"decoder_input_ids": batch} if model.config.is_encoder_decoder else {}
            model(input_ids=batch, **more)
    for handle in handles:
        handle.remove()
    return found


def close(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    # Products are summed in another order here, and inputs near zero lie on either side of a ReLU.
    return bool(((found.double() - expected).abs() <= 2e-5 * scale + 1e-7 * scale.max()).all())


@pytest.mark.parametrize("name", MODELS)
def test_moments_and_drift_are_those_of_plain_models(name: str) -> None:
    model, ids = build(name), windows()
    modules, get = linear_modules(model), quantized(model)
    found = Calibration(copy.deepcopy(model), ids, modules, "cpu")
    asked: list[str] = []

    def ask(module: str) -> QuantizedLayer:
        asked.append(module)
        return get(module)

    assert found.follow(ask)
    turns = [turn for _, turn in found._turns]
    assert found.order == [module for turn in turns for module in turn]
    reference = seen(model, modules, ids)
    drifted = 0
    for number, turn in enumerate(turns):
        before = [module for earlier in turns[:number] for module in earlier]
        # What runs before the first block is not followed.
        before = [module for module in before if "project_in" not in module]
        now = seen(replaced(model, before, get), turn, ids)
        for module in turn:
            moments, drift = found.moments(module), found.drift(module)
            pairs = list(zip(reference[module], now[module], strict=True))
            X = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in now[module]] or [moments[:0]])
            H = X.T.double() @ X.double() / max(len(X), 1)
            scale = torch.outer(H.diagonal().sqrt(), H.diagonal().sqrt())
            assert close(moments, H, scale), module
            assert (drift is None) == (number == 0)
            if drift is None:
                continue
            D, energy, count = torch.zeros_like(H), 0.0, len(X)
            for (x, y), (x_now, y_now) in pairs:
                # A pooler is given some tokens, DeBERTa's layers also relative positions.
                if x.shape[:-1].numel() in (3 * LENGTH, LENGTH):
                    rows = x_now.reshape(-1, x.shape[-1])
                    D += (x - x_now).reshape(-1, x.shape[-1]).T @ rows / count
                    energy += float((y - y_now).square().sum()) / count
            drifted += bool(D.any())
            # Inputs that are zero in one of the models need not be in the other.
            X = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in reference[module]])
            sizes = (X.square().mean(dim=0) + H.diagonal()).sqrt()
            assert close(drift.cross, D, torch.outer(sizes, sizes)), module
            assert drift.output_energy == pytest.approx(energy, rel=1e-4, abs=1e-9), module
    assert drifted >= len(modules) / 3
    assert sorted(asked) == sorted(module for turn in turns[:-1] for module in turn)


def test_what_was_skipped_changes_no_bit() -> None:
    """A run that goes on asks for the last layers only."""
    model, ids = build("t5"), windows()
    modules, get = linear_modules(model), quantized(model)
    whole = Calibration(copy.deepcopy(model), ids, modules, "cpu")
    whole.follow(get)
    last = whole.order[-1]
    everything = {module: (whole.moments(module), whole.drift(module)) for module in whole.order}
    for module in (last, whole.order[len(modules) // 2]):
        again = Calibration(copy.deepcopy(model), ids, modules, "cpu")
        again.follow(get)
        assert same((again.moments(module), again.drift(module)), everything[module])


def test_layers_take_turns_in_the_order_of_their_calls() -> None:
    model = build("llama")
    modules = linear_modules(model)
    found = Calibration(model, windows(), modules[::-1], "cpu")
    found.follow(quantized(model))
    kinds = [
        sorted(module.rpartition(".")[2].removesuffix("_proj") for module in turn)
        for _, turn in found._turns
    ]
    assert kinds == [["k", "q", "v"], ["o"], ["gate", "up"], ["down"]] * 2 + [["lm_head"]]


def same(one: tuple[Tensor, Drift | None], other: tuple[Tensor, Drift | None]) -> bool:
    (G, first), (H, second) = one, other
    if first is None or second is None:
        return first is second and torch.equal(G, H)
    streams = [each.stream for each in (first, second) if each.stream is not None]
    return (
        torch.equal(G, H)
        and torch.equal(first.cross, second.cross)
        and first.output_energy == second.output_energy
        and len(streams) in (0, 2)
        and all(torch.equal(each, streams[0]) for each in streams)
    )


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_weights_and_hidden_states_on_the_disk_give_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = BATTERY[name]
    config = {**entry.config, "vocab_size": 4096}
    model: Any = Entry(entry.model_class, entry.config_class, config).build()
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, tmp_path)
    modules, get = linear_modules(model), quantized(model)

    def collected(limit: int | None) -> Iterator[tuple[str, tuple[Tensor, Drift | None]]]:
        with open_calibration(
            tmp_path, DEMO / "heldout.txt", modules, device="cpu", most_tokens=1200,
            max_memory_bytes=limit,
        ) as found:  # fmt: skip
            found.follow(get)
            assert bool(found.on_disk) == (limit is not None)
            for module in found.order:
                yield module, (found.moments(module), found.drift(module))

    monkeypatch.setattr(calibration, "_PAIRED_TOKENS", 300)
    monkeypatch.setattr("loftq_cli.models.texts.LONGEST_WINDOW", 64)
    within, outside = dict(collected(None)), dict(collected(200_000))
    assert within.keys() == outside.keys()
    assert all(same(within[module], outside[module]) for module in within)


def test_a_model_in_one_piece_has_nothing_to_follow() -> None:
    config = transformers.AlbertConfig(
        vocab_size=96, hidden_size=64, embedding_size=32, intermediate_size=128,
        num_hidden_layers=3, num_attention_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AlbertModel(config).eval()
    modules = linear_modules(model)
    found = Calibration(model, windows(), modules, "cpu")
    alone = found.moments(modules[0])
    assert not found.follow(quantized(model))
    assert torch.equal(found.moments(modules[0]), alone)
    assert found.drift(modules[0]) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_compute_as_peft_and_bitsandbytes_do(dtype: torch.dtype) -> None:
    """Everything in the dtype of the model, the adapter in float32."""
    from loftq_cli.models.quantized_layers import quantized_forwards

    model = nn.Sequential(nn.Linear(32, 24)).to(dtype)
    layer = quantized(model.float())("0")
    assert layer.adapter is not None
    model.to(dtype)
    layer = QuantizedLayer(layer.Q.to(dtype), layer.adapter, SCALING)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    A, B = layer.adapter
    plain: Any = model[0]
    expected = nn.functional.linear(x, layer.Q, plain.bias)
    expected = expected + (
        SCALING * nn.functional.linear(nn.functional.linear(x.float(), A), B)
    ).to(dtype)
    before = model(x)
    forwards = quantized_forwards(model, {"0": layer}, "cpu")
    with torch.no_grad(), layerwise.replaced(model, forwards):
        found = model(x)
    assert torch.equal(found, expected)
    assert torch.equal(model(x), before)


def test_other_forwards_are_put_back_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = own = model[0].forward
    with pytest.raises(ZeroDivisionError), layerwise.replaced(model, {"0": lambda own, x: 1 / 0}):
        model(torch.zeros(1, 4))
    assert model[0].forward is own
