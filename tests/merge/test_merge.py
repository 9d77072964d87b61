"""A merged model computes what the adapted one does; and is an ordinary model."""

from __future__ import annotations

import json
import shutil
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loftq_cli.checkpoint.adapter import base_of
from loftq_cli.checkpoint.index import load_json, open_checkpoint
from loftq_cli.containers.bitsandbytes4 import Bitsandbytes4
from loftq_cli.models.trained_adapter import read_trained
from tests.battery import BATTERY
from tests.merge.conftest import Loftq, Trained, deviation, logits, make, save
from tests.reload import relative_error, reload
from tests.verify.conftest import edit_json

CT = ("--container", "compressed-tensors")
CASES = {
    "loftq": ("llama",),
    "pissa, 2 and 4 bits": ("llama", "--init", "pissa", "--bits", "4x1,2"),
    "fp4, nested, rslora": ("llama", "--quant-type", "fp4", "--double-quant", "--rslora",
                            "--lora-alpha", 7),
    "ranks by budget": ("llama", "--rank-budget"),
    "qlora": ("llama", "--init", "qlora"),
    "16 bits": ("llama", "--init", "lora"),
    "gptq": ("llama", "--container", "gptq", "--rank-budget", "--rslora"),
    "gptq, whole rows": ("llama", "--container", "gptq", "--init", "pissa", "--bits", 3,
                         "--block-size", -1),
    "compressed-tensors": ("llama", *CT, "--init", "pissa", "--lora-alpha", 9),
    "compressed-tensors, mixed": ("llama", *CT, "--bits", "8x1,2"),
    "Conv1D": ("gpt2",),
    "Conv1D, gptq": ("gpt2", "--container", "gptq"),
    "Conv1D, 16 bits": ("gpt2", "--init", "lora"),
    "classifier": ("bert",),
    "classifier, compressed-tensors": ("bert", *CT),
    "tied embeddings": ("qwen2",),
    "two stacks": ("t5", "--init", "pissa"),
}  # fmt: skip


def merge(loftq: Loftq, trained: Trained, out: Path, *options: object) -> Any:
    """The results of the command."""
    done = loftq("merge", trained.base, "--adapter", trained.adapter, "-o", out, *options, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)["results"]


def loaded(trained: Trained, directory: Path, **options: Any) -> Any:
    """As anyone loads it."""
    kind = getattr(transformers, BATTERY[trained.model].model_class)
    return kind.from_pretrained(directory, **options)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_adapted_model(loftq: Loftq, case: str, tmp_path: Path) -> None:
    trained = make(loftq, tmp_path, *CASES[case])
    out = tmp_path / "merged"
    results = merge(loftq, trained, out)
    expected = trained.adapted()
    model = loaded(trained, out)
    assert not hasattr(model.config, "quantization_config")
    assert not any("oftq" in name for name in map(str, model.modules()))
    assert deviation(logits(model, trained.inputs()), expected) < 1e-5
    assert results["merged_layers"] == len(read_trained(trained.adapter).pairs)
    assert results["checked_layers"] > 0
    assert results["output_deviation"] < 1e-5
    heads = ["classifier.bias", "classifier.weight"] if trained.model == "bert" else []
    assert results["replaced"] == heads
    # The wrong merge, which most tools do, is another model; so is the backbone alone. Where the
    # weights are the original's, it is the right one.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        wrong = PeftModel.from_pretrained(loaded(trained, trained.source), trained.adapter)
    off = deviation(logits(wrong.merge_and_unload(), trained.inputs()), expected)
    assert (off < 1e-5) == (case in ("16 bits", "Conv1D, 16 bits"))
    assert deviation(logits(loaded(trained, trained.source), trained.inputs()), expected) > 1e-2


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_what_the_library_dequantizes_and_the_product(
    loftq: Loftq, bits: int, tmp_path: Path
) -> None:
    """To the last bits of float32; layers of 8 bits round their inputs too."""
    trained = make(loftq, tmp_path, "llama", "--bits", bits, dtype=torch.bfloat16)
    merge(loftq, trained, tmp_path / "exact", "--dtype", "float32")
    merge(loftq, trained, tmp_path / "rounded")
    exact, rounded = (
        loaded(trained, tmp_path / name).state_dict() for name in ("exact", "rounded")
    )
    held = reload(trained.base, adapter=trained.adapter)
    assert len(held.correction) == 14
    for name, correction in held.correction.items():
        expected = held.dequantized[name] + correction
        assert relative_error(expected, exact[f"{name}.weight"].double()) < 1e-6
    # Rounded once, from float32.
    for name, weight in rounded.items():
        assert torch.equal(weight, exact[name].bfloat16()), name
    found = logits(loaded(trained, tmp_path / "exact", dtype=torch.float32), trained.inputs())
    assert deviation(found, trained.adapted()) < 0.02


def test_as_plain_libraries_train_and_load_it(loftq: Loftq, tmp_path: Path) -> None:
    """Steps of an optimizer on the quantized layers, saved by PEFT, and no code of ours."""
    made = make(loftq, tmp_path, "llama", "--init", "pissa")
    base = AutoModelForCausalLM.from_pretrained(made.base)
    model = PeftModel.from_pretrained(base, made.base, subfolder="loftq_init", is_trainable=True)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    inputs = made.inputs()
    for _ in range(3):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save(model, made.base, tmp_path / "by hand")
    expected = logits(model, inputs)
    # It is known by what it was made from, whatever it is called now.
    made = replace(made, base=made.base.rename(tmp_path / "another name"))
    trained = Trained("llama", made.source, made.base, tmp_path / "by hand")
    done = loftq("merge", made.base, "--adapter", trained.adapter, "-o", tmp_path / "merged")
    assert done.code == 0
    assert "resembles" not in done.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert deviation(logits(merged, inputs), expected) < 1e-5


def test_a_base_that_was_exported_is_the_same_one(loftq: Loftq, tmp_path: Path) -> None:
    """Trained in one container, and merged in the other: the codes are the same."""
    made = make(loftq, tmp_path, "llama", "--container", "gptq", "--init", "pissa")
    exported = replace(made, base=tmp_path / "SERVED")
    assert loftq("export", made.base, *CT, "-o", exported.base).code == 0
    merge(loftq, made, tmp_path / "one", "--dtype", "float32")
    merge(loftq, exported, tmp_path / "other", "--dtype", "float32")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


def test_what_peft_keeps_of_a_base(whole: Trained, tmp_path: Path) -> None:
    """Its name, and one dictionary: which is why an adapter of another base is known by them."""
    start = Path(shutil.copytree(whole.base / "loftq_init", tmp_path / "start"))
    told = {"loftq_base": "sha256", "loftq_config": {"base": "sha256"}}
    edit_json(start / "adapter_config.json", lambda config: config.update(told))
    path = start / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"loftq_base": "sha256"})
    base = AutoModelForCausalLM.from_pretrained(whole.base)
    with pytest.warns(UserWarning, match="loftq_base|loftq_config"):
        model = PeftModel.from_pretrained(base, start, is_trainable=True)
    model(**whole.inputs(), labels=whole.inputs()["input_ids"]).loss.backward()
    # With embeddings it would ask the hub for a model of that name.
    model.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "OUT"
    assert base_of(saved) == base_of(load_json(whole.base / "loftq_init" / "adapter_config.json"))
    assert base_of(saved) is not None
    assert "loftq_base" not in saved
    assert saved["loftq_config"] == {}
    assert "loftq_base" not in read_trained(tmp_path / "saved").header.metadata


@pytest.mark.parametrize(
    ("dtype", "most"), [("auto", 0.02), ("bfloat16", 0.02), ("float16", 5e-3), ("float32", 5e-3)]
)
def test_dtypes(loftq: Loftq, whole: Trained, dtype: str, most: float, tmp_path: Path) -> None:
    results = merge(loftq, whole, tmp_path / "merged", "--dtype", dtype)
    written = "bfloat16" if dtype == "auto" else dtype
    assert results["dtype"] == written
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == written
    kinds = {info.dtype for info in open_checkpoint(tmp_path / "merged").infos}
    assert kinds == {{"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[written]}
    model = loaded(whole, tmp_path / "merged", dtype=torch.float32)
    assert deviation(logits(model, whole.inputs()), whole.adapted()) < most


def test_what_is_there_beside_the_weights(loftq: Loftq, whole: Trained, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    results = merge(loftq, whole, out)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    files = ("config.json", "generation_config.json", "notes.txt", "README.md")
    assert names == {*files, "model.safetensors", "loftq_merge.json"}
    assert {each["name"] for each in results["files"]} == names - {"loftq_merge.json"}
    for name in ("notes.txt", "generation_config.json"):
        assert (out / name).read_bytes() == (whole.base / name).read_bytes()
    code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace('"merged"', repr(str(out))), scope)
    assert type(scope["model"]).__name__ == "LlamaForCausalLM"
    # It is an original like any other, and no output of quantize.
    again = loftq("quantize", "-m", out, "-o", tmp_path / "again", "--init", "qlora", "--rank", 4)
    assert again.code == 0, again.err
    assert not (tmp_path / "again" / "loftq_merge.json").exists()
    assert "it is a merged model, by its loftq_merge.json" in loftq("verify", out).err


def test_the_start_itself_unless_an_adapter_is_given(
    loftq: Loftq, whole: Trained, tmp_path: Path
) -> None:
    done = loftq("merge", whole.base, "-o", tmp_path / "merged")
    assert done.code == 0, done.err
    start = Trained(whole.model, whole.source, whole.base, whole.base / "loftq_init")
    merge(loftq, start, tmp_path / "named")
    merge(loftq, whole, tmp_path / "trained")
    unnamed, named, trained = (
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("merged", "named", "trained")
    )
    assert unnamed == named != trained


def test_an_adapter_that_was_begun_anew(loftq: Loftq, whole: Trained, tmp_path: Path) -> None:
    """Other ranks, on some of the layers: it is merged, and said to resemble no start."""
    base = AutoModelForCausalLM.from_pretrained(whole.base)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"],
                        rank_pattern={"layers.0.mlp.down_proj": 3}, alpha_pattern={"q_proj": 5},
                        init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    save(get_peft_model(base, config), whole.base, tmp_path / "anew")
    anew = Trained(whole.model, whole.source, whole.base, tmp_path / "anew")
    results = merge(loftq, anew, tmp_path / "merged", "--dtype", "float32")
    assert results["merged_layers"] == 4
    held = reload(whole.base, adapter=anew.adapter)
    weights = loaded(anew, tmp_path / "merged").state_dict()
    for name, Q in held.dequantized.items():
        expected = Q + held.correction.get(name, 0)
        assert relative_error(expected, weights[f"{name}.weight"].double()) < 1e-6
    same = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(whole.base)
    save(get_peft_model(base, same), whole.base, tmp_path / "same")
    done = loftq("merge", whole.base, "--adapter", tmp_path / "same", "-o", tmp_path / "other")
    assert done.code == 0
    assert "nothing in" in done.err
    assert "resembles the start in" in done.err


def test_one_weight_is_held_at_a_time(
    loftq: Loftq, whole: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runtime = Bitsandbytes4.runtime
    held: list[weakref.ref[torch.Tensor]] = []

    def watched(self: Bitsandbytes4, stored: Any) -> torch.Tensor:
        assert not [tensor for tensor in held if tensor() is not None]
        Q = runtime(self, stored)
        held[:] = [weakref.ref(Q), weakref.ref(stored.codes)]
        return Q

    monkeypatch.setattr(Bitsandbytes4, "runtime", watched)
    merge(loftq, whole, tmp_path / "merged")
    assert held
