"""The README of an output directory: its code runs as it stands."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loftq_cli import schema
from loftq_cli.models.spec import DEMO_DIRECTORY
from loftq_cli.report import units
from loftq_cli.report.card import card
from loftq_cli.starts import STARTS
from tests.cli import documents
from tests.conftest import Outcome
from tests.reload import reload


def blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def test_load_train_merge_and_evaluate_as_the_readme_says(
    tmp_path: Path, loftq: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--rank", 8, "--iterations", 1, "--lora-alpha", 32)
    assert loftq("quantize", "-o", "out", *options).code == 0
    load, train, merge, evaluate = blocks((tmp_path / "out/README.md").read_text())

    names: dict[str, Any] = {"text": "def main():\n    return 0\n"}
    exec(load, names)
    tokens = list(range(20))
    names["train_dataset"] = [{"input_ids": tokens, "labels": tokens}]
    exec(train.replace('"runs", ', '"runs", report_to=[], use_cpu=True, '), names)
    exec(merge, names)
    exec(evaluate, names)
    assert 0 < float(names["loss"].detach()) < 20
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(saved.config, "quantization_config")

    # Merged means: what the 4-bit weight dequantizes to, plus the trained s·B·A, in its dtype.
    untrained = reload(tmp_path / "out")
    name = "transformer.h.1.attn.c_proj"
    adapter = names["model"].base_model.model.get_submodule(name)
    A, B = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    expected = untrained.dequantized[name] + 4 * (B.double() @ A.double()).detach()
    merged = saved.get_submodule(name).weight.detach().T  # a Conv1D again
    assert merged.dtype == torch.bfloat16
    error = (merged.double() - expected).abs().max() / expected.abs().max()
    assert float(error) < 2**-7


def test_eight_bits_say_what_little_there_is_to_gain(
    tmp_path: Path, loftq: Callable[..., Outcome]
) -> None:
    options = ("--bits", 8, "--rank", 2, "--iterations", 1)
    outcome = loftq("quantize", "-o", tmp_path / "out", *options)
    assert "activations" in outcome.err
    assert "activations" in (tmp_path / "out/README.md").read_text()


def card_of(**changes: Any) -> str:
    """The card of a calibrated sample with other settings."""
    data = copy.deepcopy(documents.ALL["quantize-calibrated"])
    data["results"]["settings"] |= changes
    return " ".join(card(schema.document_of(data)).split())


def test_ranks_that_differ_are_no_matter_but_for_vllm() -> None:
    text = card_of()
    assert "NF4/NF2, 3.24 bits on average (blocks of 64, double quantization)" in text
    assert "a LoRA adapter of ranks 4 to 40." in text
    assert "--max-lora-rank 40" in text
    assert "It ignores rank patterns" in text
    assert "--uniform-rank" in text
    assert "3.46 bits of information a weight, stored in 4.13" in text
    assert "| weight error | 9.36 % → 7.02 % with the adapter (25.0 % of it removed) |" in text
    assert "| output error | 5.00 % → 2.00 % with the adapter (60.0 % of it removed) |" in text
    assert "calibration text (4,096 tokens)" in text


def test_padded_ranks_are_one_for_vllm() -> None:
    data = copy.deepcopy(documents.ALL["quantize-calibrated"])
    for layer in data["results"]["layers"]:
        layer["stored_rank"] = 64
    text = " ".join(card(schema.document_of(data)).split())
    assert "ranks 4 to 40, padded to 64 where B is zero." in text
    assert "--max-lora-rank 64`" in text
    assert "rank pattern" not in text


@pytest.mark.parametrize("init", STARTS)
def test_every_start_is_named(init: str) -> None:
    text = card_of(init=init)
    assert f"The adapter {STARTS[init].sentence}." in text
    assert ("Keep its dropout at 0" in text) == (init not in ("qlora", "lora"))


def test_what_was_not_quantized_is_loaded_and_merged_like_any_model(
    tmp_path: Path, loftq: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = loftq("quantize", "-o", "out", "--rank", 2, "--init", "lora", "--format", "table")
    assert outcome.code == 0, outcome.err
    assert "demo in 16 bits (LoRA) with a rank-2 adapter" in outcome.out
    assert "weight error" not in outcome.out
    text = (tmp_path / "out/README.md").read_text()
    assert "its weights as they were" in text
    for word in ("quantiz", "dequantize", "nf4", "error"):
        assert word not in text.lower()
    load, _, merge, _ = blocks(text)
    names: dict[str, Any] = {}
    exec(load, names)
    names["model"].save_pretrained("trained-adapter")
    exec(merge, names)
    merged = AutoModelForCausalLM.from_pretrained("merged").state_dict()
    original = AutoModelForCausalLM.from_pretrained(DEMO_DIRECTORY).state_dict()
    assert all(torch.equal(merged[name], each) for name, each in original.items())


def test_an_error_that_grew_and_one_that_is_not_there() -> None:
    assert units.error_change(0.08, 0.09) == "8.00 % → 9.00 % with the adapter (12.5 % more)"
    assert units.error_change(0.0, 0.0) == "0 % → 0 % with the adapter (0 % of it removed)"
