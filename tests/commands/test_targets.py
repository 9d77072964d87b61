"""`loftq targets`: names that can be pasted, what they cost, and what is skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.battery import BATTERY
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]


def results(loftq: Loftq, *argv: object) -> dict[str, Any]:
    outcome = loftq("targets", *argv, "--json")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)["results"]
    return found


def test_gpt2_at_rank_8(loftq: Loftq) -> None:
    found = results(loftq, "--model", "gpt2", "--rank", 8)
    presets = {preset["name"]: preset for preset in found["presets"]}
    assert list(presets) == ["attention", "projection", "mlp", "attention+projection", "all-linear"]
    assert [preset["trainable_parameters"] for preset in presets.values()] == [
        294_912, 516_096, 737_280, 811_008, 1_179_648,
    ]  # fmt: skip
    assert presets["attention"]["target_modules"] == ["c_attn"]
    assert presets["projection"]["target_modules"] == ["c_proj"]
    assert presets["attention+projection"]["target_modules"] == ["c_attn", "c_proj"]
    assert presets["all-linear"]["target_modules"] == ["all-linear"]
    assert presets["attention+projection"]["trainable_percent"] == 0.6475
    assert presets["attention"]["adapter_bytes"] == 4 * 294_912
    assert [
        (kind["name"], kind["count"], kind["out_features"], kind["in_features"])
        for kind in found["layers"]
    ] == [
        ("c_attn", 12, 2304, 768),
        ("attn.c_proj", 12, 768, 768),
        ("c_fc", 12, 3072, 768),
        ("mlp.c_proj", 12, 768, 3072),
    ]


def test_what_a_container_takes_of_a_model(loftq: Loftq) -> None:
    """And why not the rest, in the words with which quantize refuses it."""
    asked = ("--model", "gpt2", "--container")
    plain, gptq = results(loftq, *asked[:2]), results(loftq, *asked, "gptq")
    assert (plain["container"], plain["bits"]) == ("bitsandbytes", 4)
    weights = 84_934_656
    table = 4 * 16 * 48  # of every layer: its levels; the quantizer's state is JSON beside them
    assert 0 < plain["quantized_bytes"] - weights * 4.5 / 8 - table < 200 * 48
    blocks, inputs = weights // 64, 12 * (3 * 768 + 3072)
    assert gptq["quantized_bytes"] == weights // 2 + blocks * 2 + blocks // 2 + 4 * inputs
    assert gptq["stored_bits"] == 8 * gptq["quantized_bytes"] / weights
    assert gptq["layers"] == plain["layers"]
    other = results(loftq, *asked, "compressed-tensors")
    assert other["layers"] == []
    assert other["stored_bits"] is None
    reasons = {each["name"]: each["reason"] for each in other["skipped"]}
    assert "Conv1D, which compressed-tensors does not know" in reasons["attn.c_attn"]
    assert sum(each["parameters"] for each in other["skipped"]) == other["base_parameters"]
    refused = loftq("quantize", "--container", "compressed-tensors", "--dry-run")  # the demo
    assert reasons["attn.c_attn"] in refused.err
    page = loftq("targets", *asked, "gptq", "--format", "md").out
    assert "in gptq at 4 bits, 4." in page


def test_shares_cover_the_whole_model(loftq: Loftq) -> None:
    found = results(loftq, "--model", "gpt2")
    kinds = [*found["layers"], *found["skipped"]]
    assert sum(kind["parameters"] for kind in kinds) == found["base_parameters"] == 124_439_808
    assert sum(kind["share_of_parameters"] for kind in kinds) == pytest.approx(1)
    reasons = {kind["name"]: kind["reason"] for kind in found["skipped"]}
    assert reasons["transformer.wte"] == "embedding, tied to the output head"
    assert reasons["transformer.wpe"] == "embedding"
    assert "norms and biases" in reasons


@pytest.mark.parametrize("name", [name for name in BATTERY if BATTERY[name].cannot is None])
def test_every_name_can_be_pasted(name: str, loftq: Loftq, tmp_path: Path) -> None:
    BATTERY[name].build().save_pretrained(tmp_path)
    header, *rows = loftq("targets", "-m", tmp_path, "--rank", 4).out.splitlines()
    assert header.startswith("name\tcount\t")
    found = results(loftq, "-m", tmp_path, "--rank", 4)
    assert [row.split("\t")[0] for row in rows] == [kind["name"] for kind in found["layers"]]
    for kind in found["layers"]:
        swept = loftq("sweep-ranks", "-m", tmp_path, "--ranks", 4, "--json",
                      "--target-modules", kind["name"])  # fmt: skip
        assert swept.code == 0, swept.err
        cost = json.loads(swept.out)["results"]["ranks"][0]
        if kind["also_selects"]:
            assert cost["trainable_parameters"] > kind["trainable_parameters"]
        else:
            assert cost["trainable_parameters"] == kind["trainable_parameters"]
    for preset in found["presets"]:
        if preset["modules"]:
            swept = loftq("sweep-ranks", "-m", tmp_path, "--ranks", 4, "--json",
                          "--target-modules", ",".join(preset["target_modules"]))  # fmt: skip
            cost = json.loads(swept.out)["results"]["ranks"][0]
            assert cost["trainable_parameters"] == preset["trainable_parameters"]


def test_a_model_with_nothing_to_adapt_says_why(loftq: Loftq) -> None:
    found = results(loftq, "-m", "falcon")
    assert found["layers"] == []
    assert all(preset["trainable_parameters"] == 0 for preset in found["presets"])
    assert "a subclass of nn.Linear" in found["skipped"][0]["reason"]
    for form in ("table", "tsv", "md"):
        assert loftq("targets", "-m", "falcon", "--format", form).code == 0


def test_unknown_names_are_reported(loftq: Loftq) -> None:
    found = results(loftq, "-m", "jamba")
    assert "x_proj" in found["without_role"]
    assert results(loftq, "-m", "kimi_linear")["guessed"]
    page = loftq("targets", "-m", "jamba", "--format", "table").out
    assert "only all-linear takes these" in page


def test_the_table_tells_attention_from_the_rest_in_a_fixed_order(loftq: Loftq) -> None:
    found = results(loftq, "-m", "llama")
    assert [kind["role"] for kind in found["layers"]] == [
        "attention-in", "attention-in", "attention-in", "attention-out",
        "mlp-in", "mlp-in", "mlp-out",
    ]  # fmt: skip


def test_cut_gives_the_names() -> None:
    line = f'set -o pipefail; "{sys.executable}" -m loftq_cli targets -m gpt2 | cut -f1'
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["name", "c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    assert done.stderr == ""


def test_a_long_list_of_names_is_whole_in_json_and_short_on_a_page(loftq: Loftq) -> None:
    page = loftq("targets", "-m", "bert", "--format", "table").out
    assert "names, see --json" in "".join(page.split("\n")) or "(13" in page
    mlp = results(loftq, "-m", "bert")["presets"][2]
    assert len(mlp["target_modules"]) == 13
    assert mlp["target_modules"][1] == "0.output.dense"


def test_what_cannot_be_found(loftq: Loftq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outcome = loftq("targets", "-m", "gtp2")
    assert (outcome.code, outcome.out) == (1, "")
    assert "hint: --model gpt2" in outcome.err
