"""What experts are given, against sums in float64 over tokens that are sorted by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from loftq_cli.models.calibration import Calibration
from loftq_cli.models.quantized_layers import QuantizedLayer
from loftq_cli.models.routed import ExpertPlace
from tests.experts import NAMES, build

PARTS = {"gate_up_proj": 2, "down_proj": 1}


def ids() -> Tensor:
    return torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(0))


def places_of(model: Any) -> dict[str, ExpertPlace]:
    """Every matrix of every expert, under names of our own."""
    return {
        f"{path}.{parameter}.{expert}.{part}": ExpertPlace(path, parameter, expert, part, parts)
        for name, stack in model.named_parameters()
        if stack.ndim == 3
        for path, _, parameter in [name.rpartition(".")]
        for parts in [PARTS[parameter]]
        for expert in range(len(stack))
        for part in range(parts)
    }


def matrix(model: Any, place: ExpertPlace) -> Tensor:
    stack = model.get_submodule(place.module).get_parameter(place.parameter).detach()
    return stack[place.expert].chunk(place.parts)[place.part]


def reaching(model: Any, path: str) -> tuple[Tensor, Tensor]:
    """The hidden states that reach the experts at ``path``, in float64, and where each goes."""
    found: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: found.append((args[0].double(), args[1]))
    )
    with torch.no_grad():
        model(ids())
    handle.remove()
    ((hidden, indices),) = found
    return hidden, indices


def given(model: Any, place: ExpertPlace, hidden: Tensor) -> Tensor:
    """What a matrix of an expert is given of these hidden states, in float64."""
    if place.parameter == "gate_up_proj":
        return hidden
    stack = model.get_submodule(place.module).gate_up_proj[place.expert].detach().double()
    gate, up = (hidden @ stack.T).chunk(2, dim=-1)
    return silu(gate) * up


@pytest.mark.parametrize("name", NAMES)
def test_moments_of_the_tokens_that_are_sent_there(name: str) -> None:
    model = build(name)
    places = places_of(model)
    found = Calibration(copy.deepcopy(model), ids(), ["lm_head"], "cpu", experts=places)
    assert set(found.order) == {*places, "lm_head"}
    for module in found.order[:-1]:
        place = places[module]
        hidden, indices = reaching(model, place.module)
        x = given(model, place, hidden[(indices == place.expert).any(dim=1)])
        G = x.T @ x / len(x)
        torch.testing.assert_close(found.moments(module).double(), G, rtol=1e-4, atol=1e-6)
        assert found.drift(module) is None
    assert not found.unseen


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3"])
def test_what_quantized_experts_leave(name: str) -> None:
    """The last block's experts, behind quantized ones: the paths are the quantized model's."""
    model = build(name, num_hidden_layers=3)
    places, runtime = places_of(model), copy.deepcopy(model)
    last = max(place.module for place in places.values())
    generator = torch.Generator().manual_seed(1)
    rounded: dict[str, QuantizedLayer] = {}
    for module, place in places.items():
        W = matrix(model, place)
        Q = W + 0.3 * W.std() * torch.randn(W.shape, generator=generator)
        rounded[module] = QuantizedLayer(Q, None, 1.0)
        matrix(runtime, place).copy_(Q)
    found = Calibration(model, ids(), ["lm_head"], "cpu", experts=places)
    assert found.follow(lambda module: rounded[module])
    hidden, chosen = reaching(model, last)
    quantized, indices = reaching(runtime, last)
    assert not torch.equal(chosen.sort().values, indices.sort().values)  # some tokens go elsewhere
    for module in [each for each in found.order if places.get(each, ("",))[0] == last]:
        place = places[module]
        rows = (indices == place.expert).any(dim=1)
        # An expert's second matrix is given what its first ones leave, which are quantized then.
        x, y = given(model, place, hidden[rows]), given(runtime, place, quantized[rows])
        drift = found.drift(module)
        assert drift is not None
        H, cross = y.T @ y / len(y), (x - y).T @ y / len(y)
        energy = ((x - y) @ matrix(model, place).double().T).square().sum() / len(y)
        scale = float(H.abs().max())
        torch.testing.assert_close(found.moments(module).double(), H, rtol=1e-3, atol=1e-5 * scale)
        torch.testing.assert_close(drift.cross.double(), cross, rtol=1e-3, atol=1e-5 * scale)
        assert drift.output_energy == pytest.approx(float(energy), rel=1e-3)


def test_an_expert_that_few_tokens_reach_says_nothing() -> None:
    model = build("Mixtral")
    places = places_of(model)
    chosen = model.config._experts_implementation
    few = Calibration(model, ids()[:1, :3], ["lm_head"], "cpu", experts=places)
    assert not any(few.moments(module).any() for module in few.order if module != "lm_head")
    assert few.unseen == set(places)
    assert model.config._experts_implementation == chosen
