"""The shipped table against the models that it describes, built again on the meta device."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

from loftq_cli.models import known

SCRIPT = Path(__file__).parents[2] / "examples" / "known_models.py"
TABLE = known._table()


@cache
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("known_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def comparable(entry: dict[str, Any], reasons: list[str]) -> dict[str, Any]:
    """An entry without the numbering of its reasons."""
    left = [[*kind[:3], reasons[kind[3]]] for kind in entry["left"]]
    return {**entry, "left": left}


def assert_described(name: str, model: Any, ids: tuple[str, ...]) -> None:
    reasons: list[str] = []
    built = script().entry(model, ids, reasons)
    assert built["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert comparable(TABLE["models"][name], TABLE["reasons"]) == comparable(built, reasons)


PUBLISHED = [name for name, entry in TABLE["models"].items() if entry["ids"]]


def test_every_published_model_is_in_the_table() -> None:
    assert list(script().PUBLISHED) == PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_what_its_class_builds(name: str) -> None:
    published = script().PUBLISHED[name]
    assert TABLE["models"][name]["parameters"] == published.parameters
    assert_described(name, script().build(published.config), published.ids)


same_transformers = pytest.mark.skipif(
    transformers.__version__ != TABLE["transformers"],
    reason=f"default configs are those of transformers {TABLE['transformers']}",
)


# The rest takes half a minute, and is built with -m slow.
SAMPLE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt", "gpt_neox", "bert", "bart")


@same_transformers
@pytest.mark.parametrize("name", SAMPLE)
def test_a_default_model_is_what_its_class_builds(name: str) -> None:
    ((_, model),) = script().default_models([name])
    assert_described(name, model, ())


@same_transformers
@pytest.mark.slow
def test_every_default_model_is_what_its_class_builds(capsys: pytest.CaptureFixture[str]) -> None:
    seen = set()
    for name, model in script().default_models():
        if name not in PUBLISHED:
            assert_described(name, model, ())
            seen.add(name)
    assert seen == set(TABLE["models"]) - set(PUBLISHED)


@pytest.mark.parametrize("name", TABLE["models"])
def test_what_is_listed_adds_up(name: str) -> None:
    found = known.known_model(name)
    assert found is not None
    outline = found[1]
    modules = [layer.module for layer in outline.layers]
    assert len(set(modules)) == len(modules)
    listed = sum(layer.parameters for layer in outline.layers) + outline.vectors[1]
    assert listed + sum(prod(left.shape) for left in outline.inventory.left) == outline.parameters


def test_names_are_found_in_any_case_and_mistyped_ones_are_guessed() -> None:
    assert known.known_model("OpenAI-Community/GPT2") == known.known_model("gpt2")
    assert known.known_model("nobody/nothing") is None
    assert known.similar_names("gtp2")[0] == "gpt2"
    assert known.similar_names("meta-llama/Llama-2-7b")[0] == "meta-llama/Llama-2-7b-hf"
    assert known.similar_names("completely/different") == []


def test_patterns() -> None:
    assert list(known.expand("lm_head", "")) == ["lm_head"]
    assert list(known.expand("h.*.a", "0-2,5")) == ["h.0.a", "h.1.a", "h.2.a", "h.5.a"]
    assert list(known.expand("a.*.b.*.c", "0-1;3")) == ["a.0.b.3.c", "a.1.b.3.c"]


@pytest.mark.parametrize(
    "names",
    [
        ["h.0.a", "h.1.a", "h.3.a"],
        ["e.0.l.0.q", "e.0.l.1.q", "e.1.l.0.q", "e.1.l.1.q"],
        ["e.0.l.0.q", "e.1.l.0.q", "e.1.l.1.q"],  # no full grid
        ["head"],
    ],
)
def test_compressing_and_expanding_are_inverse(names: list[str]) -> None:
    pairs = list(script().compressed(names))
    assert sorted(each for pair in pairs for each in known.expand(*pair)) == sorted(names)


def test_the_table_is_small() -> None:
    assert known.TABLE.stat().st_size < 250_000
