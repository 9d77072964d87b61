"""Experts as layers: recognized, counted, quantized one at a time, and loaded again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli import api
from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.errors import UsageError
from loftq_cli.models.architecture import read_architecture
from loftq_cli.models.layers import linear_layers
from loftq_cli.models.loading import load_model
from loftq_cli.models.source import read_config
from loftq_cli.models.spec import DEMO_DIRECTORY
from tests.conftest import Outcome
from tests.experts import (
    NAMES,
    Made,
    experts_of,
    made_once,
    relative,
    same_experts,
    save,
    takes_a_step,
    tokens,
)

Loftq = Callable[..., Outcome]
CT = "compressed-tensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A mixture of this name in compressed-tensors, made once."""
    return made_once(tmp_path_factory, save, lambda name: {"rank": 4, "iterations": 2})


@pytest.mark.parametrize("name", NAMES)
def test_written_one_by_one_and_loaded_without_the_library(
    name: str, made: Callable[[str], Made]
) -> None:
    written = made(name)
    loaded = load_model(written.out, device="cpu", dtype="float32")
    assert same_experts(loaded.base, written.out) == len(experts_of(written.original))
    with torch.no_grad():
        expected = written.original(tokens()).logits
        assert relative(loaded.model(tokens()).logits, expected) < 0.2
    takes_a_step(loaded.model)
    before, after = (
        load_file(directory / "model.safetensors") for directory in (written.source, written.out)
    )
    routers = [tensor for tensor in before if tensor.endswith(".gate.weight")]
    assert routers
    assert all(torch.equal(before[each], after[each]) for each in routers)


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3"])
def test_verified(name: str, made: Callable[[str], Made]) -> None:
    written = made(name)
    tests = api.verify(written.out, source=str(written.source)).results.tests
    status = {test.name: test.status for test in tests}
    assert {*status.values()} <= {"passed", "skipped"}
    assert all(status[each] == "passed" for each in ("container", "residuals", "totals", "copies"))


def test_a_damaged_expert_is_found(
    made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    shutil.copytree(made("Mixtral").out, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight_scale"
    tensors[name] = tensors[name] * 2
    save_file(tensors, file, metadata={"format": "pt"})
    done = loftq(
        "verify", tmp_path / "out", "--source", made("Mixtral").source, "--json", "--quiet"
    )
    layers = json.loads(done.out)["results"]["layers"]
    assert [each["name"] for each in layers if not each["agrees"]] == [
        name.removesuffix(".weight_scale")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_names_know_the_experts_that_the_class_stacks(
    name: str, made: Callable[[str], Made]
) -> None:
    source = made(name).source
    config, tensors = read_config(source), open_checkpoint(source).infos
    by_class = read_architecture(source, config, trust_remote_code=False).inventory(tensors)
    by_names = linear_layers(tensors, config)
    found = [{each.tensor for each in inventory.layers if each.expert}
             for inventory in (by_class, by_names)]  # fmt: skip
    assert found[0] == found[1]
    assert len(found[0]) == len(experts_of(made(name).original))


def test_one_that_cannot_be_quantized_keeps_all_of_its_block(tmp_path: Path, loftq: Loftq) -> None:
    """48 columns are no whole blocks, in down alone; servers hold the three as one."""
    save("Qwen3-MoE", tmp_path / "source", moe_intermediate_size=48)
    done = loftq("quantize", "-m", tmp_path / "source", "--container", CT, "--dry-run", "--json")
    results = json.loads(done.out)["results"]
    experts = results["experts"]
    assert (experts["matrices"], experts["quantized"]) == (24, 0)
    assert experts["input_bytes"] == experts["output_bytes"] == 2 * 4 * 3 * 48 * 64 * 4
    assert not any(".experts." in layer["name"] for layer in results["without_adapter"])


def test_counted_before_loading_as_they_are_written(
    made: Callable[[str], Made], loftq: Loftq
) -> None:
    written = made("Qwen2-MoE")
    stored = load_file(written.out / "model.safetensors")
    parts = [tensor for name, tensor in stored.items() if ".experts." in name]
    nbytes = sum(each.numel() * each.element_size() for each in parts)
    matrices = experts_of(written.original).values()
    line = ("-m", written.source, "--container", CT, "--json")
    for command in ("targets", "sweep-ranks", "quantize --dry-run"):
        done = loftq(*command.split(), *line)
        experts = json.loads(done.out)["results"]["experts"]
        assert (experts["matrices"], experts["quantized"]) == (len(matrices), len(matrices))
        assert experts["parameters"] == sum(each.numel() for each in matrices)
        assert experts["output_bytes"] == nbytes
        assert sum(each["count"] for each in experts["shapes"]) == len(matrices)
    assert written.results.experts is not None
    assert written.results.experts.output_bytes == nbytes
    done = loftq("targets", "-m", written.source, "--container", "bitsandbytes", "--json")
    experts = json.loads(done.out)["results"]["experts"]
    assert experts["quantized"] == 0
    assert experts["input_bytes"] == experts["output_bytes"] == 4 * experts["parameters"]


def ignored(directory: Path, module: str) -> bool:
    """By compressed-tensors' rule, which vLLM has too."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    return any(
        re.match(each[3:], module) if each.startswith("re:") else each == module
        for each in config["ignore"]
    )


def test_what_servers_ask_of_the_config(
    made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    """vLLM asks for `experts.0.gate_proj`, whatever files call it, and for the router."""
    written = made("Mixtral")
    kept = tmp_path / "kept"
    line = ("-m", written.source, "--container", CT, "--rank", 4, "--iterations", 1)
    done = loftq("quantize", *line, "--experts", "keep", "-o", kept)
    assert done.code == 0, done.err
    assert "24 matrices" in done.err
    block = "model.layers.1.block_sparse_moe"
    for name in ("gate_proj", "w1", "w2"):
        assert ignored(kept, f"{block}.experts.0.{name}")
        assert not ignored(written.out, f"{block}.experts.0.{name}")
    for directory in (kept, written.out):
        assert ignored(directory, f"{block}.gate")
        assert not ignored(directory, "model.layers.1.self_attn.q_proj")
    before, after = (
        load_file(written.source / "model.safetensors"),
        load_file(kept / "model.safetensors"),
    )
    experts = [name for name in before if ".experts." in name]
    assert all(torch.equal(before[name], after[name]) for name in experts)
    assert loftq("verify", kept, "--source", written.source).code == 0


def test_widths_are_one_for_all_experts_of_a_block(
    made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    source = made("Qwen3-MoE").source
    for flags in (("--target-bits", 3), ("--bits", "8x1,4")):
        out = tmp_path / str(flags[1])
        line = ("-m", source, "--container", CT, "--rank", 4, "--init", "qlora", "-o", out)
        done = loftq("quantize", *line, *flags, "--json")
        assert done.code == 0, done.err
        bits: dict[str, set[int]] = {}
        for layer in json.loads(done.out)["results"]["without_adapter"]:
            bits.setdefault(layer["name"].partition(".experts.")[0], set()).add(layer["bits"])
        assert all(len(each) == 1 for each in bits.values())
        assert loftq("verify", out, "--source", source).code == 0
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == 2
    for group in groups.values():
        pattern, *others = sorted(group["targets"], reverse=True)
        assert re.fullmatch(pattern[3:], "model.layers.0.mlp.experts.0.gate_proj") or re.fullmatch(
            pattern[3:], "model.layers.1.mlp.experts.3.down_proj"
        )
        assert len(others) == 4  # of the attention
        assert not any(".experts." in each for each in others)


def test_a_trained_adapter_is_merged_beside_them(
    made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    written, merged = made("Qwen3-MoE"), tmp_path / "merged"
    done = loftq("merge", written.out, "-o", merged)
    assert done.code == 0, done.err
    plain = load_model(merged, device="cpu", dtype="float32")
    assert same_experts(plain.model, written.out) == 24
    with torch.no_grad():
        adapted = load_model(written.out, device="cpu", dtype="float32").model(tokens()).logits
        assert relative(plain.model(tokens()).logits, adapted) < 1e-4


def test_merged_and_quantized_again(
    made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    out = tmp_path / "out"
    line = ("merge", made("Qwen3-MoE").out, "--requantize", "-o", out)
    assert loftq(*line, "--bits", 4).code == 0
    same_experts(load_model(out, device="cpu", dtype="float32").model, out)
    done = loftq(*line, "--force", "--container", "gptq")
    assert done.code == 1
    assert "is an expert" in done.err


@pytest.mark.parametrize("flags", [("--bits", 8), ("--init", "lora")])
def test_where_nothing_reads_them_they_are_not_quantized(
    flags: tuple[object, ...], made: Callable[[str], Made], loftq: Loftq
) -> None:
    line = ("quantize", "-m", made("Mixtral").source, *flags, "--dry-run", "--json")
    experts = json.loads(loftq(*line).out)["results"]["experts"]
    assert (experts["matrices"], experts["quantized"]) == (24, 0)
    done = loftq(*line, "--experts", "quantize")
    assert done.code == 2, done.err


def test_in_gptq_for_its_own_loader(
    made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    """Kept unless asked for, exported as they would have been written, by names that it knows."""
    written, out = made("Qwen3-MoE"), tmp_path / "out"
    line = ("quantize", "-m", written.source, "--container", "gptq", "--rank", 4)
    kept = json.loads(loftq(*line, "--dry-run", "--json").out)["results"]["experts"]
    assert (kept["quantized"], "gptqmodel's own loader" in kept["reason"]) == (0, True)
    done = loftq(*line, "--iterations", 2, "--experts", "quantize", "-o", out)
    assert done.code == 0, done.err
    loaded = load_model(out, device="cpu", dtype="float32")
    same_experts(loaded.base, written.out)
    assert "GPTQModel.load" in (out / "README.md").read_text()
    assert loftq("verify", out, "--source", written.source).code == 0
    exported = tmp_path / "exported"
    done = loftq("export", written.out, "--container", "gptq", "-o", exported)
    assert done.code == 0, done.err
    for name in ("model.safetensors", "config.json", "loftq_init/adapter_model.safetensors"):
        assert (exported / name).read_bytes() == (out / name).read_bytes()
    assert "GPTQModel.load" in (exported / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "said"), [("Mixtral", "not for w"), ("Qwen2-MoE", "the adapter would be put on")]
)
def test_not_exported_where_nothing_would_read_it(
    name: str, said: str, made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    done = loftq("export", made(name).out, "--container", "gptq", "-o", tmp_path / "out")
    assert done.code == 1
    assert said in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("order", ["sequential", "parallel"])
def test_calibrated_on_the_tokens_that_reach_them(order: str, tmp_path: Path, loftq: Loftq) -> None:
    """Codes of every expert are chosen for its own inputs, without an adapter to help."""
    save("Mixtral", tmp_path / "source", vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_DIRECTORY / name, tmp_path / "source" / name)
    text = tmp_path / "text.txt"
    text.write_text((DEMO_DIRECTORY / "calibration.txt").read_text("utf-8")[:20_000], "utf-8")
    done = loftq(
        *("quantize", "-m", tmp_path / "source", "--container", CT, "--rank", 4, "--bits", 2),
        *("--init", "calibrated", "--calibration-order", order, "--calibration-text", text),
        *("-o", tmp_path / "out", "--json"),
    )
    assert done.code == 0, done.err
    assert "moments" not in done.err
    rows = json.loads(done.out)["results"]["without_adapter"]
    experts = [row for row in rows if ".experts." in row["name"] and row["bits"]]
    assert len(experts) == 24
    for row in experts:
        assert row["output_error_relative"] < 0.8 * row["quantized_only_output_error_relative"]
    assert loftq("verify", tmp_path / "out", "--source", tmp_path / "source").code == 0


def test_in_bitsandbytes_for_other_readers(
    made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    """One by one, each as its library dequantizes it; what reads it not says so, and it merges."""
    source, out = made("Qwen2-MoE").source, tmp_path / "out"
    line = ("quantize", "-m", source, "--rank", 4, "--iterations", 1, "-o", out)
    done = loftq(*line, "--experts", "quantize", "--json")
    assert done.code == 0, done.err
    results = json.loads(done.out)["results"]
    stored = load_file(out / "model.safetensors")
    names = [layer["name"] for layer in results["without_adapter"] if ".experts." in layer["name"]]
    assert len(names) == len(experts_of(made("Qwen2-MoE").original))
    original = load_file(source / "model.safetensors")
    for name in names:
        parts = {
            each: tensor for each, tensor in stored.items() if each.startswith(f"{name}.weight.")
        }
        Q = dequantize_4bit(stored[f"{name}.weight"], QuantState.from_dict(parts, "cpu"))
        assert relative(Q.float(), original[f"{name}.weight"]) < 0.12
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.mlp.gate" in config["llm_int8_skip_modules"]
    targets = json.loads((out / "loftq_init" / "adapter_config.json").read_text())
    ends = targets["target_modules"]
    assert not any(f"{name}".endswith(f".{end}") for name in names for end in ends)
    assert "transformers 4" in (out / "README.md").read_text()

    done = loftq("verify", out, "--source", source, "--json")
    assert done.code == 0, done.err
    tests = {test["name"]: test for test in json.loads(done.out)["results"]["tests"]}
    assert tests["forward"]["status"] == "passed"
    assert "loftq_cli.load" in tests["forward"]["detail"]
    loaded = json.loads(loftq("load", "-m", out, "--json").out)["results"]
    assert loaded["quantized_layers"] == len(results["layers"]) + len(results["without_adapter"])
    merged = tmp_path / "merged"
    assert loftq("merge", out, "-o", merged).code == 0
    plain = load_model(merged, device="cpu", dtype="float32").model
    with torch.no_grad():
        expected = made("Qwen2-MoE").original(tokens()).logits
        assert relative(plain(tokens()).logits, expected) < 0.2

    again = tmp_path / "again"  # packed, and without an adapter
    assert loftq("merge", out, "--requantize", "-o", again).code == 0
    done = loftq("verify", again, "--json")
    assert done.code == 0, done.err
    tests = {test["name"]: test for test in json.loads(done.out)["results"]["tests"]}
    assert tests["forward"]["status"] == "passed"
    assert "trainable" not in (again / "README.md").read_text("utf-8")
    with pytest.raises(UsageError, match="no adapter to train"):
        loftq_cli.load(again, trainable=True)


def test_stacked_ones_are_kept_and_told_to_servers(tmp_path: Path, loftq: Loftq) -> None:
    save("gpt-oss", tmp_path / "source")
    line = ("quantize", "-m", tmp_path / "source", "--container", CT, "--rank", 4)
    done = loftq(*line, "--iterations", 1, "-o", tmp_path / "out", "--json")
    experts = json.loads(done.out)["results"]["experts"]
    assert (experts["matrices"], experts["quantized"]) == (2 * 4 * 2, 0)
    assert "stacked experts" in experts["reason"]
    assert ignored(tmp_path / "out", "model.layers.1.mlp.experts.0.gate_proj")
    assert ignored(tmp_path / "out", "model.layers.1.mlp.router")
