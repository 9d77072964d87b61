"""Experts that files hold as one: taken apart, quantized one at a time, and put together again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist

from loftq_cli import api
from loftq_cli.checkpoint import files
from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.containers import container_of
from loftq_cli.engines.settings import Settings
from loftq_cli.models import known, stacking
from loftq_cli.models.architecture import read_architecture
from loftq_cli.models.layers import linear_layers
from loftq_cli.models.loading import load_model
from loftq_cli.models.source import read_config
from tests.conftest import Outcome
from tests.experts import (
    ASK,
    BLOCK_SIZE,
    KINDS,
    Made,
    expected,
    made_once,
    relative,
    save_stacked,
    stacks_of,
    takes_a_step,
    tokens,
)
from tests.zoo.making import BATTERY, LLAMA_LIKE

Loftq = Callable[..., Outcome]
CT = "compressed-tensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Of this name in compressed-tensors, made once."""

    def settings(name: str) -> dict[str, Any]:
        experts = "quantize" if KINDS[name].asked else None
        return {"rank": 4, "iterations": 2, "experts": experts}

    return made_once(tmp_path_factory, save_stacked, settings)


@pytest.mark.parametrize("name", KINDS)
def test_taken_apart_quantized_and_put_together(name: str, made: Callable[[str], Made]) -> None:
    source, out, original, _ = made(name)
    loaded = load_model(out, device="cpu", dtype="float32")
    tensors, before = load_file(out / "model.safetensors"), stacks_of(original.state_dict())
    held = stacks_of(loaded.base.state_dict())
    assert held.keys() == before.keys() != set()
    for stack, W in before.items():
        for expert in range(4):
            Q = expected(name, tensors, stack, expert)
            assert torch.equal(held[stack][expert], Q)
            assert relative(Q, W[expert]) < 0.12
        assert stack not in tensors
    with torch.no_grad():
        assert relative(loaded.model(tokens()).logits, original(tokens()).logits) < 0.5
    takes_a_step(loaded.model)
    # Routers and biases are as they were.
    stored = load_file(source / "model.safetensors")
    kept = stored.keys() & tensors.keys()
    assert any("router" in each or ".gate." in each for each in kept)
    assert all(torch.equal(stored[each], tensors[each]) for each in kept)
    assert {each for each in stored if each.endswith("_bias")} <= kept


def test_blocks_lie_along_the_inputs(made: Callable[[str], Made]) -> None:
    """The codes of a turned matrix are those that the matrix has by itself."""
    source, out, *_ = made("gpt-oss")
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    W = load_file(source / "model.safetensors")[stack][2].T.contiguous()
    container = container_of(CT, 4, Settings(container_name=CT))
    quantized = container.quantizer(4).quantize(W, W.dtype)
    tensors = load_file(out / "model.safetensors")
    module = "model.layers.1.mlp.experts.2.gate_up_proj"
    for tensor, memory in container.tensors(f"{module}.weight", quantized):
        found = tensors[tensor].contiguous().view(torch.uint8).numpy().tobytes()
        assert found == bytes(memory), tensor
    assert tensors[f"{module}.weight_scale"].shape == (W.shape[0], W.shape[1] // BLOCK_SIZE)


@pytest.mark.parametrize("name", KINDS)
def test_verified_merged_and_loaded_by_transformers(
    name: str, made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    source, out, *_ = made(name)
    tests = api.verify(out, source=str(source)).results.tests
    status = {test.name: test.status for test in tests}
    assert {*status.values()} <= {"passed", "skipped"}, tests
    assert all(status[each] == "passed" for each in ("container", "residuals", "totals", "copies"))
    merged = tmp_path / "merged"
    done = loftq("merge", out, "-o", merged)
    assert done.code == 0, done.err
    model, info = AutoModelForCausalLM.from_pretrained(
        merged, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    loaded = load_model(out, device="cpu", dtype="float32")
    plain, held = stacks_of(model.state_dict()), stacks_of(loaded.base.state_dict())
    assert plain.keys() == held.keys()
    assert all(torch.equal(plain[each], held[each]) for each in held)
    with torch.no_grad():
        found, adapted = model.eval()(tokens()).logits, loaded.model(tokens()).logits
        assert relative(found, adapted) < 1e-4


@pytest.mark.parametrize("name", ["gpt-oss", "Qwen3.5-MoE"])
def test_never_more_of_a_stack_in_memory_than_an_expert(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_stacked(name, tmp_path / "source", num_hidden_layers=2)
    header = open_checkpoint(tmp_path / "source").headers["model.safetensors"]
    ranges: list[tuple[int, int]] = []
    read = files.pieces_at

    def recording(fd: int, start: int, end: int, path: Path) -> Any:
        if path == header.path:
            ranges.append((start, end))
        return read(fd, start, end, path)

    monkeypatch.setattr(files, "pieces_at", recording)
    api.quantize(
        str(tmp_path / "source"), output=tmp_path / "out", container=CT, rank=4, init="qlora",
        experts="quantize",
    )  # fmt: skip
    stacks = [info for info in header.tensors.values() if len(info.shape) == 3
              and ".experts." in info.name]  # fmt: skip
    for info in stacks:
        inside = [(a, b) for a, b in ranges if info.start <= a < b <= info.end]
        assert sum(b - a for a, b in inside) >= info.nbytes
        assert max(b - a for a, b in inside) <= info.nbytes // 4


@pytest.mark.parametrize("name", KINDS)
def test_counted_before_loading_as_they_are_written(
    name: str, made: Callable[[str], Made], loftq: Loftq
) -> None:
    source, out, original, results = made(name)
    line = ("quantize", "-m", source, "--container", CT, *KINDS[name].asked, "--dry-run", "--json")
    for more in ((), ("--preflight",)):
        done = loftq(*line, *more)
        experts = json.loads(done.out)["results"]["experts"]
        assert results.experts is not None
        assert experts == results.experts.model_dump(mode="json")
    stored = load_file(out / "model.safetensors")
    parts = [each for key, each in stored.items()
             if ".experts." in key and not key.endswith("_bias")]  # fmt: skip
    assert experts["output_bytes"] == sum(each.numel() * each.element_size() for each in parts)
    assert experts["parameters"] == sum(
        each.numel() for each in stacks_of(original.state_dict()).values()
    )
    assert experts["matrices"] == experts["quantized"] > 0


@pytest.mark.parametrize("name", KINDS)
def test_names_know_what_the_class_says(name: str, made: Callable[[str], Made]) -> None:
    source = made(name).source
    config, tensors = read_config(source), open_checkpoint(source).infos
    by_class = read_architecture(source, config, trust_remote_code=False).inventory(tensors)
    found = [
        {each.tensor: each.stack for each in inventory.left if each.stack is not None}
        for inventory in (by_class, linear_layers(tensors, config))
    ]
    assert found[0] == found[1]
    assert len(found[0]) == len(stacks_of(made(name).original.state_dict()))


@pytest.mark.parametrize("name", ["gpt-oss", "Gemma 4", "Granite-MoE"])
def test_kept_where_transformers_has_no_rule(
    name: str, made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    """Said before a weight is read, and how to have it otherwise."""
    source = made(name).source
    done = loftq("quantize", "-m", source, "--container", CT, "--dry-run", "--json")
    experts = json.loads(done.out)["results"]["experts"]
    assert (experts["quantized"], experts["loader"]) == (0, None)
    assert experts["input_bytes"] == experts["output_bytes"]
    assert "--experts quantize" in experts["reason"]
    assert "transformers has no rule" in done.err
    for container in ("bitsandbytes", "gptq"):
        done = loftq("quantize", "-m", source, "--container", container, "--dry-run", "--json")
        experts = json.loads(done.out)["results"]["experts"]
        assert (experts["quantized"], experts["reason"][:15]) == (0, "stacked experts")
    card = (made(name).out / "README.md").read_text()
    assert "transformers does not load them" in card
    assert "from_pretrained" not in card


def test_a_block_that_cannot_be_quantized_stays(tmp_path: Path, loftq: Loftq) -> None:
    save_stacked("Gemma 4", tmp_path / "source", moe_intermediate_size=48)
    line = ("quantize", "-m", tmp_path / "source", "--container", CT, *ASK, "--dry-run", "--json")
    for more in ((), ("--preflight",)):
        experts = json.loads(loftq(*line, *more).out)["results"]["experts"]
        assert (experts["matrices"], experts["quantized"]) == (2 * 4 * 3, 0)
        assert "a matrix of one" in experts["reason"]


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_of_their_own_in_bitsandbytes(bits: int, tmp_path: Path, loftq: Loftq) -> None:
    """transformers holds a quantized Llama 4's experts as layers: no one has to ask for them."""
    original, out = save_stacked("Llama 4", tmp_path / "source"), tmp_path / "out"
    done = loftq("quantize", "-m", tmp_path / "source", "--bits", bits, "--rank", 4,
                 "--iterations", 1, "-o", out, "--json")  # fmt: skip
    assert done.code == 0, done.err
    experts = json.loads(done.out)["results"]["experts"]
    assert (experts["matrices"], experts["quantized"]) == (4 * 3, 4 * 3)
    assert experts["loader"] == "transformers"
    loaded = load_model(out, device="cpu", dtype="float32")
    layer = loaded.base.model.layers[1].feed_forward.experts[2]
    kind = {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert {type(each).__name__ for each in (layer.gate_proj, layer.up_proj)} == {kind}
    with torch.no_grad():
        assert relative(loaded.model(tokens()).logits, original(tokens()).logits) < 0.25
    takes_a_step(loaded.model)
    tests = api.verify(out, source=str(tmp_path / "source")).results.tests
    status = {test.name: test.status for test in tests}
    assert all(status[each] == "passed" for each in ("container", "residuals", "copies", "forward"))
    assert "transformers 4" not in (out / "README.md").read_text()
    done = loftq("merge", out, "-o", tmp_path / "merged")
    assert done.code == 0, done.err
    merged = load_model(tmp_path / "merged", device="cpu", dtype="float32").model
    with torch.no_grad():
        found = merged(tokens()).logits
        assert relative(found, loaded.model(tokens()).logits) < (0.01 if bits == 4 else 0.1)


@pytest.mark.parametrize("name", ["Llama 4", "Gemma 4", "gpt-oss"])
def test_not_exported_for_a_reader_that_has_them_as_one(
    name: str, made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    done = loftq("export", made(name).out, "--container", "gptq", "-o", tmp_path / "out")
    assert done.code == 1, done.err
    assert "stacked experts" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("container", [CT, "bitsandbytes"])
def test_what_transformers_takes_apart_cannot_be_kept(
    container: str, made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    """The weights of a quantized Llama 4 with its experts as one would be made up."""
    line = ("quantize", "-m", made("Llama 4").source, "--container", container)
    done = loftq(*line, "--experts", "keep", "-o", tmp_path / "out")
    assert done.code == 1, done.err
    assert "model.layers.1.feed_forward.experts" in done.err
    assert not (tmp_path / "out").exists()


def test_a_stack_with_a_hole_is_not_loaded(
    made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    out = made("gpt-oss").out
    for each in out.iterdir():
        if each.is_file() and each.name != "model.safetensors":
            (tmp_path / each.name).write_bytes(each.read_bytes())
    tensors = load_file(out / "model.safetensors")
    gone = "model.layers.0.mlp.experts.1.down_proj."
    kept = {name: each for name, each in tensors.items() if not name.startswith(gone)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = loftq("load", "-m", tmp_path)
    assert done.code == 1
    assert "no file has all matrices of model.layers.0.mlp.experts.down_proj" in done.err


def test_known_without_files_too(loftq: Loftq) -> None:
    for model, quantized in (
        ("mixtral", 32 * 8 * 3),
        ("deepseek_v3", 58 * 256 * 3),
        ("gpt_oss", 0),
    ):
        done = loftq("targets", "-m", model, "--container", CT, "--json")
        experts = json.loads(done.out)["results"]["experts"]
        assert experts["quantized"] == quantized
        found = known.known_model(model)
        assert found is not None
        assert 0.9 < experts["share_of_parameters"] == experts["parameters"] / found[1].parameters


def test_names_know_the_classes_that_have_rules() -> None:
    """Of the model types in the shipped table: what stacks experts, and by which names."""
    for name in known._table()["models"]:
        found = known.known_model(name)
        assert found is not None
        stacks = {each.stack for each in found[1].inventory.left} - {None}
        merged = [
            tuple(each.removesuffix(".weight").rpartition(".")[2] for each in rule.source_patterns)
            for rule in get_checkpoint_conversion_mapping(name) or []
            if any(isinstance(step, MergeModulelist) for step in getattr(rule, "operations", ()))
        ]
        for stack in stacks:
            assert stack is not None
            # By some types transformers finds no rules that it finds by their classes.
            if stack.ruled != (stack.parts in merged):
                assert (name, merged) == ("dots3_note_text", [])
    assert not stacking._UNRULED & stacking._LIKE_MIXTRAL


def test_turned_files(tmp_path: Path, loftq: Loftq) -> None:
    """Qwen3-VL's mixture has (in, out) in files, and (out, in) in its class."""
    config = {
        "text_config": {**LLAMA_LIKE, "head_dim": 16, "model_type": "qwen3_vl_moe_text",
                        "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2},
        "vision_config": {"depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
                          "out_hidden_size": 64, "deepstack_visual_indexes": [0],
                          "num_position_embeddings": 16},
    }  # fmt: skip
    entry = replace(
        BATTERY["llama"], model_class="Qwen3VLMoeForConditionalGeneration",
        config_class="Qwen3VLMoeConfig", config=config,
    )  # fmt: skip
    model = entry.build()
    model.save_pretrained(tmp_path / "source")
    held, file = stacks_of(model.state_dict()), tmp_path / "source" / "model.safetensors"
    stored = {
        name: each.transpose(1, 2).contiguous() if name in held else each
        for name, each in load_file(file).items()
    }
    save_file(stored, file, metadata={"format": "pt"})
    done = loftq("quantize", "-m", tmp_path / "source", "--container", CT, *ASK, "--rank", 4,
                 "--iterations", 1, "-o", tmp_path / "out")  # fmt: skip
    assert done.code == 0, done.err
    loaded = stacks_of(
        load_model(tmp_path / "out", device="cpu", dtype="float32").base.state_dict()
    )
    assert loaded.keys() == held.keys()
    for name, W in held.items():
        assert relative(loaded[name], W) < 0.12
    assert loftq("verify", tmp_path / "out", "--source", tmp_path / "source").code == 0


def test_adapters_on_experts_that_a_rule_stacks(tmp_path: Path, loftq: Loftq) -> None:
    """Where files have them as one, the start is that of the same experts one by one."""
    model = save_stacked("Mixtral", tmp_path / "stacked")
    model.save_pretrained(tmp_path / "apart")
    found = []
    for name in ("stacked", "apart"):
        line = ("quantize", "-m", tmp_path / name, "--container", CT, "--rank", 2)
        done = loftq(*line, "--iterations", 1, "--target-modules", "all-linear,experts",
                     "-o", tmp_path / f"{name}-out")  # fmt: skip
        assert done.code == 0, done.err
        adapter = tmp_path / f"{name}-out" / "loftq_init" / "adapter_model.safetensors"
        found.append(load_file(adapter))
    assert found[0].keys() == found[1].keys()
    on_experts = [name for name in found[0] if ".experts" in name]
    assert len(on_experts) == 2 * 2 * 2
    assert all(torch.equal(found[0][name], found[1][name]) for name in on_experts)
