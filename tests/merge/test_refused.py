"""What cannot be merged, with the reason, before any weight is read; and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq_cli.checkpoint import files
from tests.merge.conftest import Loftq, Trained, forget_base, make
from tests.verify.conftest import edit_json, edit_report

LAYER = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{LAYER}.lora_{part}.weight" for part in "AB")


def refused(loftq: Loftq, trained: Trained, out: Path, *options: object, code: int = 1) -> str:
    """The whole message of a run that writes nothing."""
    before = sorted(out.parent.iterdir())
    done = loftq("merge", trained.base, "--adapter", trained.adapter, "-o", out, *options)
    assert (done.code, done.out) == (code, ""), done.err
    assert "Traceback" not in done.err
    assert sorted(out.parent.iterdir()) == before
    return done.err


@pytest.fixture
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> Any:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(files, "pieces_at", read)


def edit_config(trained: Trained, **changes: Any) -> None:
    edit_json(trained.adapter / "adapter_config.json", lambda config: config.update(changes))


def edit_tensors(trained: Trained, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = trained.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: each.contiguous() for name, each in tensors.items()}, path)


@pytest.mark.usefixtures("no_weight_is_read")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "it is 'IA3', and LoRA is what can be folded in"),
        ({"use_dora": True}, "its use_dora is True: DoRA also scales"),
        ({"lora_bias": True}, "it has a bias beside B"),
        ({"bias": "all"}, "its bias is 'all': the biases of the base"),
        ({"target_parameters": ["experts.up"]}, "A and B for other experts than"),
        ({"target_parameters": "experts.up"}, "its target_parameters are 'experts.up'"),
        ({"trainable_token_indices": [1]}, "embeddings of single tokens"),
        ({"layer_replication": [[0, 1]]}, "its layer_replication is [[0, 1]]: loftq does not"),
        ({"an_option_of_2030": {"x": 1}}, "its an_option_of_2030 is {'x': 1}: loftq does not"),
        ({"init_lora_weights": "pissa_niter_4"}, "PEFT changed the weights of the base"),
        ({"init_lora_weights": "loftq"}, "PEFT changed the weights of the base"),
        ({"init_lora_weights": ["loftq"]}, "PEFT changed the weights of the base"),
        ({"r": 8}, "have ranks 4 and 4, and by its config it is 8"),
        ({"rank_pattern": {"q_proj": 2}}, "and by its config it is 2"),
        ({"rank_pattern": {"(": 2}}, "its rank_pattern is {'(': 2}"),
        ({"rank_pattern": [2]}, "its rank_pattern is [2]"),
        ({"lora_alpha": None}, "its lora_alpha is None"),
        ({"lora_alpha": "4"}, "its lora_alpha is '4'"),
        ({"base_model_name_or_path": "org/another"}, "trained on another base"),
        ({"base_model_name_or_path": None}, "is none, and this one is called 'OUT'"),
        ({"base_model_name_or_path": ""}, "is '', and this one"),
    ],
)
def test_configs(
    loftq: Loftq, trained: Trained, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    forget_base(trained.adapter)
    edit_config(trained, **changes)
    assert said in refused(loftq, trained, tmp_path / "merged")


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for part in "AB":
        tensors[f"{new}.lora_{part}.weight"] = tensors.pop(f"{old}.lora_{part}.weight")


HERE = f"base_model.model.{LAYER}"


@pytest.mark.usefixtures("no_weight_is_read")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(A), "has only one of A and B"),
        (
            lambda tensors: (tensors.pop(A), tensors.pop(B)),
            f"also targets '{LAYER}' (1 such layers), for which it has no A and B",
        ),
        (lambda tensors: rename(tensors, HERE, "base_model.model.lm_head"), "it adapts 'lm_head'"),
        (
            lambda tensors: rename(tensors, HERE, HERE.replace("layers.0", "layers.7")),
            "it adapts 'model.layers.7.self_attn.q_proj', which is none of the 14 layers",
        ),
        (
            lambda tensors: tensors.update({A: torch.zeros(4, 32)}),
            "is [64, 64] here, and A and B are for [64, 32]",
        ),
        (lambda tensors: tensors.update({A: torch.zeros(3, 64)}), "have ranks 3 and 4"),
        (lambda tensors: tensors.update({A: torch.zeros(4)}), "no matrices of numbers"),
        (
            lambda tensors: tensors.update({A: torch.zeros(4, 64, dtype=torch.int8)}),
            "no matrices of numbers",
        ),
        (
            lambda tensors: tensors.update(
                {f"{HERE}.lora_magnitude_vector.weight": torch.ones(64)}
            ),
            "neither A or B of a layer nor a trained head",
        ),
        (lambda tensors: tensors.update({"other": torch.ones(1)}), "neither A or B of a layer"),
        (
            lambda tensors: tensors.update({"base_model.model.score.weight": torch.ones(3, 64)}),
            "it brings 'score.weight' of shape [3, 64], and the model in",
        ),
        (
            lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(3, 64)}),
            "has it as [96, 64]",
        ),
        (
            lambda tensors: tensors.update({f"{HERE}.weight": torch.ones(64, 64)}),
            "has none among the weights that are not quantized",
        ),
        (lambda tensors: [tensors.pop(name) for name in list(tensors)], "no pair of A and B"),
    ],
)
def test_tensors(
    loftq: Loftq,
    trained: Trained,
    change: Callable[[dict[str, torch.Tensor]], None],
    said: str,
    tmp_path: Path,
) -> None:
    edit_tensors(trained, change)
    assert said in refused(loftq, trained, tmp_path / "merged")


def test_an_adapter_of_another_base(
    loftq: Loftq, whole: Trained, trained: Trained, tmp_path: Path
) -> None:
    """By what it was made from; one that does not say that, by its name."""
    other = make(loftq, tmp_path / "other", "llama", "--bits", 2)
    other.base.rename(tmp_path / "other" / "TWO")
    mixed = Trained("llama", other.source, tmp_path / "other" / "TWO", trained.adapter)
    assert json.loads((trained.adapter / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(whole.base)
    for name in ("elsewhere/OUT", "TWO"):
        edit_config(trained, base_model_name_or_path=name)
        message = refused(loftq, mixed, tmp_path / "merged")
        assert "it was trained on another base: one of " in message
        assert f"by auto_mapping in its adapter_config.json, and {mixed.base} is " in message
    # Whatever path led there, and whatever it is called now.
    forget_base(other.adapter)
    done = loftq("merge", mixed.base, "--adapter", other.adapter, "-o", tmp_path / "known")
    assert done.code == 0, done.err
    forget_base(trained.adapter)
    edit_config(trained, base_model_name_or_path="elsewhere/FOUR")
    message = refused(loftq, mixed, tmp_path / "merged")
    assert "it was trained on another base" in message
    assert "'elsewhere/FOUR', and this one is called 'OUT' or 'TWO'" in message
    # One of the same name is not told apart by it; but nothing in it resembles the start.
    edit_config(trained, base_model_name_or_path="elsewhere/OUT")
    done = loftq("merge", mixed.base, "--adapter", trained.adapter, "-o", tmp_path / "merged")
    assert done.code == 0
    assert "or on another base of the same name" in done.err


def test_a_tied_head(loftq: Loftq, tmp_path: Path) -> None:
    trained = make(loftq, tmp_path, "gpt2", "--init", "qlora")
    head = "base_model.model.transformer.wte.weight"
    edit_tensors(trained, lambda tensors: tensors.update({head: torch.ones(96, 64)}))
    message = refused(loftq, trained, tmp_path / "merged")
    assert "which this model ties to another weight" in message


def test_numbers_that_are_none(loftq: Loftq, trained: Trained, tmp_path: Path) -> None:
    edit_tensors(trained, lambda tensors: tensors[B].fill_(float("nan")))
    out = tmp_path / "merged"
    done = loftq("merge", trained.base, "--adapter", trained.adapter, "-o", out)
    assert (done.code, done.out) == (1, "")
    assert f"has no numbers at {LAYER}" in done.err
    assert not out.exists()


def test_numbers_that_float16_does_not_hold(loftq: Loftq, trained: Trained, tmp_path: Path) -> None:
    edit_tensors(trained, lambda tensors: tensors[B].fill_(1e6))
    out = tmp_path / "merged"
    options = ("--adapter", trained.adapter, "-o", out)
    done = loftq("merge", trained.base, *options, "--dtype", "float16")
    assert (done.code, done.out) == (1, "")
    assert f"'{LAYER}.weight' does not fit into float16" in done.err
    assert loftq("merge", trained.base, *options).code == 0


def test_no_adapter(loftq: Loftq, trained: Trained, tmp_path: Path) -> None:
    (trained.adapter / "adapter_model.safetensors").rename(trained.adapter / "adapter_model.bin")
    assert "a pickle only" in refused(loftq, trained, tmp_path / "merged")
    shutil.rmtree(trained.adapter)
    assert "there is no such directory" in refused(loftq, trained, tmp_path / "merged")
    whole = Trained("llama", trained.source, trained.source, trained.base / "loftq_init")
    assert "has no loftq_report.json" in refused(loftq, whole, tmp_path / "merged")


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.safetensors", flip, "it has not the SHA-256"),
        ("config.json", append, "were written"),
        ("notes.txt", flip, "it has not the SHA-256"),
        ("loftq_init/adapter_config.json", flip, "it has not the SHA-256"),
        ("loftq_init/adapter_model.safetensors", Path.unlink, "it is missing"),
    ],
)
def test_a_file_that_is_not_the_one_of_the_report(
    loftq: Loftq,
    trained: Trained,
    name: str,
    damage: Callable[[Path], None],
    said: str,
    tmp_path: Path,
) -> None:
    damage(trained.base / name)
    out = tmp_path / "merged"
    done = loftq("merge", trained.base, "--adapter", trained.adapter, "-o", out)
    assert (done.code, done.out) == (1, "")
    assert f"{trained.base / name} is not the file that was written" in done.err
    assert said in done.err
    assert not out.exists()


def test_the_start_in_the_directory_is_held_against_the_report_too(
    loftq: Loftq, trained: Trained, tmp_path: Path
) -> None:
    flip(trained.base / "loftq_init" / "adapter_model.safetensors")
    done = loftq("merge", trained.base, "-o", tmp_path / "merged")
    assert done.code == 1
    assert "adapter_model.safetensors is not the file that was written" in done.err


def test_a_report_that_does_not_fit_its_files(
    loftq: Loftq, trained: Trained, tmp_path: Path
) -> None:
    def change(results: Any) -> None:
        results["layers"][0]["shape"] = [32, 64]

    edit_report(trained.base, change)
    message = refused(loftq, trained, tmp_path / "merged")
    assert "no weight file has all tensors of 4 bits of shape [32, 64]" in message


def test_an_output_that_nobody_may_replace(loftq: Loftq, trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    (out / "precious").mkdir(parents=True)
    assert "already exists" in refused(loftq, trained, out)
    assert "was not written by loftq" in refused(loftq, trained, out, "--force")
    assert "choose one" in refused(loftq, trained, out, "--force", "--resume", code=2)
    for inside in (trained.base, trained.base / "below", trained.adapter / "below"):
        assert "lies in the source" in refused(loftq, trained, inside, "--resume", code=2)
