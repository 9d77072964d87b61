"""What servers would refuse of a directory, `verify` says; what `quantize` writes, they take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loftq_cli import schema
from loftq_cli.containers import container_names
from loftq_cli.containers.integers import Integers
from loftq_cli.core import budgets
from loftq_cli.models.spec import DEMO_DIRECTORY
from loftq_cli.report.serving import cautions
from loftq_cli.starts import STARTS
from tests.cli import documents
from tests.verify.conftest import Loftq, edit_json, reseal, run_verify, statuses

ADAPTER_CONFIG = "loftq_init/adapter_config.json"


def model(directory: Path, kv_heads: int = 2) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DIRECTORY / name, directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("llama"))


def quantized(loftq: Loftq, source: Path, out: Path, *options: object) -> Path:
    done = loftq("quantize", "-m", source, "-o", out, "--rank", 2, *options)
    assert done.code == 0, done.err
    return out


def found_by(results: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (test for test in results["tests"] if test["name"] == name)
    return found


@pytest.mark.parametrize("container", container_names())
def test_the_adapter_begins_as_it_is_whatever_the_start(
    container: str, llama: Path, tmp_path: Path, loftq: Loftq
) -> None:
    """vLLM refuses the names of starts there, and PEFT would start once more."""
    text = tmp_path / "text"
    text.write_text("def f(x):\n    return x\n" * 100)
    for name, start in STARTS.items():
        if not start.quantizes and container != "bitsandbytes":
            continue
        more: tuple[object, ...] = ("--iterations", 1) if start.iterates else ()
        if start.needs_moments:
            more = (*more, "--calibration-text", text)
        out = quantized(loftq, llama, tmp_path / name, "--container", container, "--init", name,
                        *more)  # fmt: skip
        assert json.loads((out / ADAPTER_CONFIG).read_text())["init_lora_weights"] is True


@pytest.mark.parametrize("container", ["gptq", "compressed-tensors"])
def test_the_name_of_a_start_in_its_place_is_found(
    container: str, llama: Path, tmp_path: Path, loftq: Loftq
) -> None:
    out = quantized(loftq, llama, tmp_path / "out", "--container", container)
    _, results = run_verify(loftq, out)
    assert set(statuses(results).values()) <= {"passed", "skipped"}
    assert not any(test["notes"] for test in results["tests"] if test["name"] != "forward")
    edit_json(out / ADAPTER_CONFIG, lambda config: config.update(init_lora_weights="loftq"))
    reseal(out)
    done, results = run_verify(loftq, out)
    assert done.code == 3
    assert "vLLM refuses any but true and false" in found_by(results, "adapter")["cause"]


def test_parts_of_one_layer_have_one_width(
    llama: Path, tmp_path: Path, loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As no run chooses them: 2 and 3 bits in turns."""
    with monkeypatch.context() as patch:
        patch.setattr(Integers, "even_when_fused", False)
        patch.setattr(budgets, "spread_bits", lambda lost, *_: [2, 3] * (len(lost) // 2) + [2])
        out = quantized(loftq, llama, tmp_path / "out", "--container", "compressed-tensors",
                        "--target-bits", 2.5)  # fmt: skip
    report = json.loads((out / "loftq_report.json").read_text())["results"]
    bits = {each["name"].rpartition(".")[2]: each["bits"] for each in report["layers"]}
    assert len({bits[name] for name in ("q_proj", "k_proj", "v_proj")}) > 1
    done, results = run_verify(loftq, out)
    assert done.code == 3
    assert "vLLM refuses parts of one layer with several" in found_by(results, "container")["cause"]


def test_a_part_that_is_not_quantized_is_told(tmp_path: Path, loftq: Loftq) -> None:
    """16 rows are no whole group, so k and v stay in 16 bits, and all is as reported."""
    source = model(tmp_path / "source", kv_heads=1)
    out = quantized(loftq, source, tmp_path / "out", "--container", "compressed-tensors")
    done, results = run_verify(loftq, out)
    assert done.code == 0
    (note,) = found_by(results, "container")["notes"]
    assert "vLLM refuses this directory" in note
    assert "k_proj" in note
    assert note.endswith("only model.layers.0.self_attn.q_proj is quantized")
    assert "vLLM" in loftq("verify", out, "--format", "table").out


def test_what_sglang_would_mis_scale_is_told(llama: Path, tmp_path: Path, loftq: Loftq) -> None:
    for container, told in (("gptq", 1), ("bitsandbytes", 0)):
        out = quantized(loftq, llama, tmp_path / container, "--container", container, "--rslora")
        done, results = run_verify(loftq, out)
        assert done.code == 0
        notes = found_by(results, "adapter")["notes"]
        assert len(notes) == told
        assert all("SGLang ignores rsLoRA" in note for note in notes)


@pytest.mark.parametrize(("rank", "told"), [(512, []), (513, ["vLLM takes no adapter of a rank"])])
def test_a_rank_above_all_that_vllm_takes(rank: int, told: list[str]) -> None:
    data = documents.quantize()
    for layer in data["results"]["layers"]:
        layer["rank"] = rank
    found = cautions(schema.document_of(data).results)
    assert [each.startswith(start) for each, start in zip(found, told, strict=True)] == [
        True for _ in told
    ]
