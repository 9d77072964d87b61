"""Which layers write to the residual stream, and what it has lost, against hooks set by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loftq_cli.models import calibration
from loftq_cli.models.calibration import Calibration
from loftq_cli.models.layerwise import StagedModel
from loftq_cli.models.residual_stream import places
from tests import experts
from tests.battery import BATTERY, LLAMA_LIKE, Entry
from tests.models.test_expert_inputs import places_of
from tests.models.test_sequential import (
    LENGTH,
    close,
    linear_modules,
    quantized,
    replaced,
    seen,
    windows,
)

MULTIPLIER = 0.22
GRANITE = Entry(
    "GraniteForCausalLM", "GraniteConfig", {**LLAMA_LIKE, "residual_multiplier": MULTIPLIER}
)
LLAMA_STREAM = {
    "model.layers.{}.self_attn.o_proj": [("model.layers.{}.input_layernorm", 0)],
    "model.layers.{}.mlp.down_proj": [("model.layers.{}.post_attention_layernorm", 0)],
}
# Of each writer, what is in the stream that it writes to: what a norm is given (0), or what another
# layer puts out (1).
WRITERS: dict[str, dict[str, list[tuple[str, int]]]] = {
    "llama": LLAMA_STREAM,
    "granite": LLAMA_STREAM,
    "gpt2": {
        "transformer.h.{}.attn.c_proj": [("transformer.h.{}.ln_1", 0)],
        "transformer.h.{}.mlp.c_proj": [("transformer.h.{}.ln_2", 0)],
    },
    "gpt_neox": {
        "gpt_neox.layers.{}.attention.dense": [("gpt_neox.layers.{}.input_layernorm", 0)],
        "gpt_neox.layers.{}.mlp.dense_4h_to_h": [
            ("gpt_neox.layers.{}.input_layernorm", 0),
            ("gpt_neox.layers.{}.attention.dense", 1),
        ],
    },
    # With tokens of all windows in one dimension, and windows apart.
    "opt": {
        "model.decoder.layers.{}.self_attn.out_proj": [
            ("model.decoder.layers.{}.self_attn_layer_norm", 0)
        ],
        "model.decoder.layers.{}.fc2": [("model.decoder.layers.{}.final_layer_norm", 0)],
    },
}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_PAIRED_TOKENS", 3 * LENGTH)  # 3, 3 and 1 windows


def build(name: str) -> Any:
    entry = GRANITE if name == "granite" else BATTERY[name]
    model: Any = entry.build()
    # In a new model most biases are zero, and what layers add is little beside the stream.
    generator = torch.Generator().manual_seed(1)
    for each, parameter in model.named_parameters():
        if each.endswith(".bias"):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        elif "embed" not in each and parameter.ndim == 2:
            parameter.data *= 4
    return model


@pytest.mark.parametrize("name", WRITERS)
def test_what_the_stream_has_lost_is_that_of_plain_models(name: str) -> None:
    model, ids = build(name), windows()
    modules, get = linear_modules(model), quantized(model)
    found = Calibration(copy.deepcopy(model), ids, modules, "cpu")
    assert found.follow(get)
    streams = {
        writer.format(block): [(module.format(block), end) for module, end in terms]
        for writer, terms in WRITERS[name].items()
        for block in range(2)
    }
    names = list({*streams, *(module for terms in streams.values() for module, _ in terms)})
    factor = 1 / MULTIPLIER if name == "granite" else 1.0
    reference = seen(model, names, ids)
    turns = [turn for _, turn in found._turns]
    for number, turn in enumerate(turns):
        before = [module for earlier in turns[:number] for module in earlier]
        before = [module for module in before if "project_in" not in module]
        now = seen(replaced(model, before, get), names, ids) if {*turn} & {*streams} else {}
        for module in turn:
            drift = found.drift(module)
            if module not in streams:
                assert drift is None or drift.stream is None, module
                continue
            assert drift is not None
            assert drift.stream is not None, module
            X, lost = rows(now[module], 0), torch.zeros(1).double()
            for each, end in streams[module]:
                lost = lost + rows(reference[each], end) - rows(now[each], end)
            S = factor * lost.T @ X / len(X)
            both = rows(reference[streams[module][0][0]], streams[module][0][1]), X
            sizes = (each.square().mean(dim=0).sqrt() for each in both)
            scale = torch.outer(*sizes) * factor
            assert bool(S.any()) == (number > 1), module  # the first writes to what is as it was
            assert close(drift.stream, S, scale), module


def rows(calls: list[tuple[Tensor, Tensor]], end: int) -> Tensor:
    """What a module is given (0) or puts out (1) in all batches, as (tokens × width)."""
    return torch.cat([call[end].reshape(-1, call[end].shape[-1]) for call in calls])


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "bert", "deberta_v2"])
def test_what_is_not_a_sum_has_no_writers(name: str) -> None:
    """Normalized before or after it is added, and experts that are not seen."""
    model = build(name)
    staged = StagedModel(model, windows(), linear_modules(model), "cpu")
    assert len(staged.stages) > 1
    assert not staged.places


def test_experts_that_are_quantized_too_write_nothing() -> None:
    model = experts.build("Mixtral")
    held = {place.module for place in places_of(model).values()}
    staged = StagedModel(model, windows(64), [*linear_modules(model), *held], "cpu")
    assert len(staged.stages) > 1
    assert not staged.places


@pytest.mark.parametrize("name", ["llama", "granite", "gpt2", "gpt_neox", "bloom", "t5", "opt"])
def test_sixteen_bits_find_the_writers_too(name: str) -> None:
    """With sums that are rounded."""
    model = build(name)
    modules = linear_modules(model)
    exact = StagedModel(model, windows(), modules, "cpu").places
    coarse = StagedModel(model.to(torch.bfloat16), windows(), modules, "cpu").places
    assert exact
    assert {module: [*place.before] for module, place in exact.items()} == {
        module: [*place.before] for module, place in coarse.items()
    }
    for module, place in exact.items():
        assert coarse[module].share == pytest.approx(place.share, rel=0.01)
        assert coarse[module].before == pytest.approx(place.before, rel=0.01)


class Both(nn.Module):
    """Two layers that are given the same, and whose outputs come to the stream together."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.one(x) + self.two(x)
        return y


def test_layers_that_are_quantized_side_by_side_do_not_both_make_it_good() -> None:
    model = build("llama")
    model.model.layers[1].mlp = Both()
    found = StagedModel(model, windows(), linear_modules(model), "cpu").places
    inside = [module for module in found if module.startswith("model.layers.1.")]
    assert inside == ["model.layers.1.self_attn.o_proj"]


def test_the_sum_is_taken_at_its_word() -> None:
    """Multiples, layers that add nothing, and what does not add up."""
    generator = torch.Generator().manual_seed(0)
    h, a, b, q, other = (torch.randn(1, 16, 32, generator=generator) for _ in range(5))
    outputs = {"q": [q], "a": [a], "b": [b[0]]}
    found = places("block", h, (h + 0.5 * a - 3 * b, None), outputs)
    assert [*found] == ["a", "b"]
    assert found["a"].share == pytest.approx(2)
    assert not found["a"].before
    assert found["b"].share == pytest.approx(-1 / 3)
    assert found["b"].before == pytest.approx({"a": -0.5 / 3})
    end = h + a + b
    for given, output, seen_outputs in (
        (h, end + 0.01 * other, outputs),  # something else is added
        (h, end, {"a": [a]}),
        (h, end * 1.01, outputs),
        (h, end, {"a": [a], "b": [b], "same": [b + 1e-3 * other]}),  # which of the two?
        (h, end, {"a": [a], "b": [b, b]}),  # called twice
        (h, end, {"a": [a], "b": [b], "dead": [0 * b]}),
        (h, h, outputs),  # nothing is added
        (h, end, {}),
        (h[:, 1:], end, outputs),
        (None, end, outputs),
        (h, None, outputs),
    ):
        assert not places("block", given, output, seen_outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_that_is_like_a_writer_is_none(dtype: torch.dtype) -> None:
    """What rounding makes of its share would be divided by."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        h, o, d, other = (torch.randn(1, 16, 64, generator=generator) for _ in range(4))
        h, o, d, alike = (each.to(dtype) for each in (h, o, d, o + 0.05 * other))
        found = places("block", h, (h + o + d,), {"alike": [alike], "o": [o], "d": [d]})
        assert set(found) in ({"o", "d"}, set())


def test_a_block_that_is_not_called_is_told_of() -> None:
    from loftq_cli.errors import UnsupportedModel
    from loftq_cli.models.residual_stream import Place, StreamLoss

    loss = StreamLoss(Place("block", 1.0, {}), (4, 4), "cpu")
    loss.begin()
    with pytest.raises(UnsupportedModel, match="block is not always called as a module"):
        loss.given(torch.ones(2, 4))
