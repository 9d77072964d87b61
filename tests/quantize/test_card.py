"""The README of an output directory: its code runs as it stands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

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
