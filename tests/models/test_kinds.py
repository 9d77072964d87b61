"""Names of layers: every kind has one, and the presets' names choose exactly their layers."""

from __future__ import annotations

import pytest

from loftq_cli.engines.plan import match_targets
from loftq_cli.models.kinds import VECTORS, kinds, shortest_names, skipped_modules
from loftq_cli.models.known import _table, known_model
from loftq_cli.models.layers import LinearLayer
from loftq_cli.models.outline import Outline
from loftq_cli.models.presets import PRESETS, is_guessed, presets, role_of

KNOWN = list(_table()["models"])


def outline(name: str) -> Outline:
    found = known_model(name)
    assert found is not None
    return found[1]


def layer(module: str, out_features: int = 64, in_features: int = 64) -> LinearLayer:
    return LinearLayer(module, f"{module}.weight", out_features, in_features, False, "F32")


def named(name: str) -> dict[str, list[str]]:
    return {preset.name: preset.target_modules for preset in presets(outline(name).layers)}


def test_gpt2() -> None:
    assert named("gpt2") == {
        "attention": ["c_attn"],
        "projection": ["c_proj"],
        "mlp": ["c_fc", "mlp.c_proj"],
        "attention+projection": ["c_attn", "c_proj"],
        "all-linear": ["all-linear"],
    }
    found = kinds(outline("gpt2").layers)
    assert {kind.name for kind in found} == {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}
    assert all(len(kind.layers) == 12 and not kind.also_selects for kind in found)


@pytest.mark.parametrize(
    ("name", "attention", "projection", "mlp"),
    [
        (
            "llama",
            "q_proj k_proj v_proj",
            "o_proj down_proj",
            "gate_proj up_proj down_proj",
        ),
        ("phi3", "qkv_proj", "o_proj down_proj", "gate_up_proj down_proj"),
        ("opt", "k_proj v_proj q_proj", "out_proj fc2", "fc1 fc2"),
        ("gpt_neox", "query_key_value", "dense dense_4h_to_h", "dense_h_to_4h dense_4h_to_h"),
        ("bloom", "query_key_value", "dense dense_4h_to_h", "dense_h_to_4h dense_4h_to_h"),
        ("gptj", "k_proj v_proj q_proj", "out_proj fc_out", "fc_in fc_out"),
        ("mixtral", "q_proj k_proj v_proj", "o_proj", ""),
        ("deepseek_v3", "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj", "o_proj down_proj",
         "gate_proj up_proj down_proj"),
        ("mamba", "", "", ""),
    ],
)  # fmt: skip
def test_presets_in_the_names_of_an_architecture(
    name: str, attention: str, projection: str, mlp: str
) -> None:
    found = named(name)
    assert set(found["attention"]) == set(attention.split())
    assert set(found["projection"]) == set(projection.split())
    assert set(found["mlp"]) == set(mlp.split())
    assert set(found["attention+projection"]) == set(f"{attention} {projection}".split())


def test_a_number_is_named_only_where_nothing_else_tells_layers_apart() -> None:
    found = named("bert")
    assert found["projection"] == ["output.dense"]
    numbered = [f"{block}.output.dense" for block in range(12)]
    assert found["mlp"] == ["intermediate.dense", *numbered]
    by_name = {kind.name: kind for kind in kinds(outline("bert").layers)}
    assert by_name["output.dense"].also_selects == ("attention.output.dense",)
    assert len(by_name["output.dense"].layers) == 12


@pytest.mark.parametrize("name", KNOWN)
def test_names_choose_exactly_what_they_stand_for(name: str) -> None:
    found = outline(name)
    for preset in presets(found.layers):
        if preset.layers:
            chosen = match_targets(found.inventory, preset.target_modules)
            assert chosen == {each.module for each in preset.layers}
    groups = kinds(found.layers)
    for kind in groups:
        chosen = match_targets(found.inventory, [kind.name])
        own = {each.module for each in kind.layers}
        assert chosen >= own
        others = [other for other in groups if other.name in kind.also_selects]
        more = {each.module for other in others for each in other.layers}
        assert chosen == own | more
    assert sum(len(kind.layers) for kind in groups) == len(found.layers)
    skipped = skipped_modules(found)
    left = sum(kind.parameters for kind in skipped)
    assert left + sum(each.parameters for each in found.layers) == found.parameters
    assert all(kind.reason for kind in skipped)


def test_every_layer_of_a_well_known_decoder_has_a_role_by_name() -> None:
    for name in ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "phi", "phi3", "opt"):
        for each in outline(name).layers:
            assert role_of(each.module) is not None
            assert not is_guessed(each.module)


def test_unknown_names_go_by_their_place_or_to_all_linear_alone() -> None:
    assert role_of("h.0.self_attn.funny_proj") == "attention-in"
    assert role_of("h.0.self_attn.output_gate") == "attention-out"
    assert role_of("h.0.mlp.funny") == "mlp-in"
    assert role_of("h.0.mlp.step_down") == "mlp-out"
    assert is_guessed("h.0.mlp.funny")
    assert role_of("pooler.funny") is None
    assert role_of("h.0.mixer.out_proj") is None, "a state-space layer, not attention"
    layers = [layer("pooler.funny"), layer("h.0.mlp.funny")]
    by_name = {preset.name: preset.layers for preset in presets(layers)}
    assert by_name["mlp"] == (layers[1],)
    assert by_name["all-linear"] == tuple(layers)


def test_shortest_names_grow_until_they_are_unambiguous() -> None:
    layers = [layer("e.0.x.dense"), layer("e.1.x.dense"), layer("d.0.x.dense"), layer("top")]
    assert shortest_names(layers, layers) == ["dense", "top"]
    assert shortest_names(layers[:2], layers) == ["e.0.x.dense", "1.x.dense"]
    assert shortest_names([], layers) == []


def test_layers_whose_shape_depends_on_the_block() -> None:
    layers = [layer("h.0.proj", 64), layer("h.1.proj", 128)]
    first, second = kinds(layers)
    assert (first.name, second.name) == ("proj", "proj")
    assert first.also_selects == ("proj",)


def test_skipped_kinds_are_summed_up() -> None:
    found = {kind.name: kind for kind in skipped_modules(outline("mixtral"))}
    assert found["experts.gate_up_proj"].count == 32
    assert found["experts.gate_up_proj"].shape == [8, 28672, 4096]
    assert "stacked experts" in found["experts.gate_up_proj"].reason
    assert found["mlp.gate"].reason == "expert router"
    assert list(found)[-1] == VECTORS


def test_presets_are_these() -> None:
    assert [*PRESETS, "all-linear"] == list(named("gpt2"))
