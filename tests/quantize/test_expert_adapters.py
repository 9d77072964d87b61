"""Adapters on experts: their starts, in PEFT's layout, on what the codes of each leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.models.loading import load_model
from tests.conftest import Outcome
from tests.experts import (
    NAMES,
    Made,
    experts_in,
    experts_of,
    made_once,
    relative,
    save,
    takes_a_step,
    tokens,
)

Loftq = Callable[..., Outcome]
CT = "compressed-tensors"
RANK = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A mixture of this name with adapters on attention and experts, made once."""
    asked = {"target_modules": "all-linear,experts", "lora_alpha": 8, "svd": "exact"}
    return made_once(tmp_path_factory, save, lambda name: {"rank": RANK, "iterations": 1, **asked})


def wrappers(model: Any) -> dict[tuple[str, str], ParamWrapper]:
    """PEFT's adapters on stacks, by block and parameter."""
    return {
        (".".join(name.split(".")[3:5]), module.parameter_name): module
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_best_of_its_rank_for_each_expert(name: str, made: Callable[[str], Made]) -> None:
    """By PEFT's own delta, against a float64 SVD of what all of its matrices leave together."""
    written = made(name)
    model = load_model(written.out, device="cpu", dtype="float32").model
    weights, codes = experts_of(written.original), experts_in(written.out)
    adapters = wrappers(model)
    assert {kind for _, kind in adapters} == {"gate_up_proj", "down_proj"}
    left = whole = before = 0.0
    for (layer, kind), wrapper in adapters.items():
        delta = wrapper.get_delta_weight("default").detach()
        for expert, own in enumerate(delta):
            parts = [(layer, kind, expert, part) for part in (0, 1)]
            W, Q = (
                torch.cat([held[part] for part in parts if part in held]).double()
                for held in (weights, codes)
            )
            U, S, Vh = torch.linalg.svd(W - Q)
            best = (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]
            assert relative(own.double(), best) < 1e-4
            whole += float(W.square().sum())
            before += float((W - Q).square().sum())
            left += float((W - Q - own).square().sum())
    told = written.results.expert_adapters
    assert told.backbone_error_relative == pytest.approx((before / whole) ** 0.5, rel=1e-5)
    assert told.weight_error_relative == pytest.approx((left / whole) ** 0.5, rel=1e-5)
    assert told.weight_error_relative < 0.97 * told.backbone_error_relative
    parameters = sum(
        factor["default"].weight.numel()
        for wrapper in adapters.values()
        for factor in (wrapper.lora_A, wrapper.lora_B)
    )
    assert told.parameters == parameters
    trained = [each for name, each in model.named_parameters() if ".lora_" in name]
    assert written.results.totals.trainable_parameters == sum(each.numel() for each in trained)
    takes_a_step(model)


@pytest.mark.parametrize("name", NAMES)
def test_its_config_is_peft_s_own(name: str, made: Callable[[str], Made]) -> None:
    written = made(name)
    config = json.loads((written.out / "loftq_init" / "adapter_config.json").read_text("utf-8"))
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["target_parameters"] == written.results.expert_adapters.target_parameters
    kind = type(written.original)
    with torch.device("meta"):
        fresh = get_peft_model(
            kind(written.original.config),
            LoraConfig(
                r=RANK,
                target_modules=config["target_modules"],
                target_parameters=config["target_parameters"],
            ),
        )
    wanted = {
        name.replace(".default", ""): tuple(each.shape)
        for name, each in fresh.named_parameters()
        if ".lora_" in name
    }
    stored = load_file(written.out / "loftq_init" / "adapter_model.safetensors")
    assert {name: tuple(each.shape) for name, each in stored.items()} == wanted


def test_verified_and_its_damage_found(
    made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    written = made("Mixtral")
    done = loftq("verify", written.out, "--source", written.source, "--json")
    assert done.code == 0, done.err
    tests = {each["name"]: each for each in json.loads(done.out)["results"]["tests"]}
    assert tests["adapter"]["status"] == tests["totals"]["status"] == "passed"
    assert "4 parameters of experts" in tests["adapter"]["detail"]
    shutil.copytree(written.out, tmp_path / "out")
    file = tmp_path / "out" / "loftq_init" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.mlp.experts.lora_B.weight"][:, 0] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    done = loftq("verify", tmp_path / "out", "--source", written.source, "--json")
    tests = {each["name"]: each for each in json.loads(done.out)["results"]["tests"]}
    assert tests["residuals"]["status"] == "failed"
    assert "experts do not leave what was reported with" in tests["residuals"]["detail"]


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3"])
def test_merged_with_all_others(
    name: str, made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    """What was trained, into each matrix of the files, as PEFT merges it in the loaded model."""
    written, merged = made(name), tmp_path / "merged"
    model: Any = loftq_cli.load(written.out, trainable=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
        expected = model(tokens()).logits
    model.save_pretrained(tmp_path / "trained")
    line = ("merge", written.out, "--adapter", tmp_path / "trained", "-o", merged)
    done = loftq(*line, "--json")
    assert done.code == 0, done.err
    results = json.loads(done.out)["results"]
    assert results["merged_layers"] == len(experts_of(written.original)) + len(
        written.results.layers
    )
    plain = load_model(merged, device="cpu", dtype="float32").model
    with torch.no_grad():
        assert relative(plain(tokens()).logits, expected) < 1e-4
    found = experts_of(model.merge_and_unload())
    assert all(relative(own, found[place]) < 1e-5 for place, own in experts_of(plain).items())


@pytest.mark.parametrize("flags", [("--init", "lora"), ("--container", "bitsandbytes")])
def test_experts_in_16_bits_begin_as_lora_does(
    flags: tuple[str, ...], made: Callable[[str], Made], tmp_path: Path, loftq: Loftq
) -> None:
    written, out = made("Qwen3-MoE"), tmp_path / "out"
    targets = ("--target-modules", "q_proj,v_proj,mlp.experts.down_proj")
    line = ("quantize", "-m", written.source, "--rank", RANK, "-o", out, *targets, *flags)
    assert loftq(*line, "--verify").code == 0
    model: Any = loftq_cli.load(out, trainable=True)
    adapters = wrappers(model)
    assert {kind for _, kind in adapters} == {"down_proj"}
    for wrapper in adapters.values():
        assert not wrapper.get_delta_weight("default").any()
        assert wrapper.lora_A["default"].weight.std() > 0.01
    takes_a_step(model)


def test_counted_before_loading_as_they_are_written(
    made: Callable[[str], Made], loftq: Loftq
) -> None:
    written = made("DeepSeek-V3")
    line = ("-m", written.source, "--container", CT, "--target-modules", "all-linear,experts")
    done = loftq("quantize", *line, "--rank", RANK, "--dry-run", "--json")
    results = json.loads(done.out)["results"]
    totals = written.results.totals
    assert results["totals"]["trainable_parameters"] == totals.trainable_parameters
    assert results["expert_adapters"]["parameters"] == written.results.expert_adapters.parameters
    done = loftq("sweep-ranks", *line, "--ranks", RANK, "--json")
    (cost,) = json.loads(done.out)["results"]["ranks"]
    assert cost["trainable_parameters"] == totals.trainable_parameters


@pytest.mark.parametrize(
    ("targets", "flags", "code", "message"),
    [
        ("experts", (), 2, "beside other layers"),
        ("q_proj,experts.up_proj", (), 1, "no experts are called"),
        ("all-linear,experts", ("--rank", 65), 1, "too large for an expert"),
        (
            "all-linear,experts",
            ("--container", "bitsandbytes", "--experts", "quantize"),
            1,
            "adds such an adapter once more",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    targets: str,
    flags: tuple[object, ...],
    code: int,
    message: str,
    made: Callable[[str], Made],
    loftq: Loftq,
) -> None:
    line = ("quantize", "-m", made("Mixtral").source, "--container", CT, "--dry-run")
    done = loftq(*line, "--target-modules", targets, *flags)
    assert done.code == code
    assert message in done.err
