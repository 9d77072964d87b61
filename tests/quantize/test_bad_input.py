"""Bad input gets an error with a cause or a hint, no traceback, and leaves no directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq_cli.checkpoint import writer
from loftq_cli.core import loftq as core_loftq
from loftq_cli.models.spec import DEMO_DIRECTORY
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the built-in model, to be damaged."""
    shutil.copytree(DEMO_DIRECTORY, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def refused(tmp_path: Path, loftq: Loftq) -> Callable[..., str]:
    """Runs a line that must fail; gives what it says on stderr."""

    def run(*options: object, code: int = 1) -> str:
        out = tmp_path / "out"
        outcome = loftq("quantize", "-o", out, *options)
        assert outcome.code == code, outcome.err
        assert outcome.out == ""
        assert "error: " in outcome.err
        assert "Traceback" not in outcome.err
        assert not out.exists()
        return outcome.err

    return run


def edit_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def test_no_such_directory(refused: Callable[..., str]) -> None:
    err = refused("-m", "./nowhere")
    assert "hint: " in err
    assert "demo" in err


def test_no_such_hub_id_offline(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    err = refused("-m", "nobody/nothing")
    assert "demo" in err
    assert "HF_HUB_OFFLINE" in err


def test_only_pickle_weights(refused: Callable[..., str], model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    err = refused("-m", model)
    assert "pickle" in err
    assert "save_pretrained" in err


def test_already_quantized_names_the_original(
    refused: Callable[..., str], model: Path, loftq: Loftq, tmp_path: Path
) -> None:
    edit_config(model, quantization_config={"quant_method": "gptq"}, _name_or_path="org/original")
    err = refused("-m", model)
    assert "gptq" in err
    assert "org/original" in err


def test_own_output_as_input_names_its_source(
    refused: Callable[..., str], loftq: Loftq, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    assert loftq("quantize", "-o", first, "--iterations", 1, "--rank", 1).code == 0
    assert "--model demo" in refused("-m", first)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_truncated_weights(keep: int, refused: Callable[..., str], model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors" in refused("-m", model)


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_index_that_leads_outside(target: str, refused: Callable[..., str], model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    index = {"weight_map": {"transformer.wte.weight": target}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "index.json" in refused("-m", model)


def test_output_exists(loftq: Loftq, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    outcome = loftq("quantize", "-o", out)
    assert outcome.code == 1
    assert "--force" in outcome.err
    # Not even --force deletes a directory that loftq did not write.
    outcome = loftq("quantize", "-o", out, "--force")
    assert outcome.code == 1
    assert (out / "precious").read_text() == "kept"


def test_force_replaces_and_resume_accepts_what_is_complete(loftq: Loftq, tmp_path: Path) -> None:
    line = ("quantize", "-o", tmp_path / "out", "--iterations", 1, "--rank", 2, "--json")
    first = loftq(*line)
    assert loftq(*line).code == 1
    again = loftq(*line, "--resume")
    assert again.code == 0
    assert json.loads(again.out)["results"] == json.loads(first.out)["results"]
    assert loftq(*line, "--resume", "--rank", 3).code == 1
    assert loftq(*line, "--force", "--rank", 3).code == 0
    config = json.loads((tmp_path / "out/loftq_init/adapter_config.json").read_text())
    assert config["r"] == 3


def test_full_disk_before_the_start(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "free_bytes", lambda path: 1000)
    assert "missing" in refused(code=4)


def test_full_disk_on_the_way(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(writer.os, "posix_fallocate", no_room)
    assert "No space left" in refused(code=4)


def test_rank_too_large(refused: Callable[..., str]) -> None:
    err = refused("--rank", 257)
    assert "transformer.h.0.attn.c_attn" in err
    assert "--rank 256" in err


def test_block_size_that_does_not_fit(refused: Callable[..., str]) -> None:
    assert "--block-size 256" in refused("--block-size", 512)
    assert "4096" in refused("--block-size", 100, code=2)


@pytest.mark.parametrize("alpha", ["0", "-1", "inf", "nan", "1e300", "1e-300"])
def test_lora_alpha_out_of_range(alpha: str, refused: Callable[..., str]) -> None:
    assert "--lora-alpha 16" in refused("--lora-alpha", alpha, code=2)


@pytest.mark.parametrize(
    "options",
    [
        ("--bits", 8, "--quant-type", "fp4"),
        ("--bits", 8, "--block-size", 32),
        ("--bits", 8, "--double-quant"),
        ("--init", "qlora", "--iterations", 7),
        ("--init", "qlora", "--svd", "exact"),
        ("--force", "--resume"),
    ],
)
def test_options_without_effect_are_refused(
    options: tuple[object, ...], refused: Callable[..., str]
) -> None:
    refused(*options, code=2)


def test_unknown_target_names_its_neighbours(refused: Callable[..., str]) -> None:
    err = refused("--target-modules", "c_atn")
    assert "--target-modules c_attn" in err
    assert "c_proj" in err


def test_target_that_is_no_linear_layer(refused: Callable[..., str]) -> None:
    assert "embedding" in refused("--target-modules", "wte")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float, refused: Callable[..., str], model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    tensors[name][3, 5] = bad
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    err = refused("-m", model)
    assert name in err
    assert "1 " in err  # how many


def test_code_in_the_checkpoint_is_not_run(refused: Callable[..., str], model: Path) -> None:
    edit_config(
        model, model_type="mystery", auto_map={"AutoModelForCausalLM": "evil.Model"},
        architectures=["Model"],
    )  # fmt: skip
    (model / "evil.py").write_text("raise SystemExit('ran')")
    assert "--trust-remote-code" in refused("-m", model)


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_layer", 10**9), ("n_layer", -1), ("vocab_size", 10**12), ("n_positions", 0)],
)
def test_config_value_out_of_range_is_named(
    key: str, value: int, refused: Callable[..., str], model: Path
) -> None:
    edit_config(model, **{key: value})
    err = refused("-m", model)
    assert "config.json" in err
    assert key in err


@pytest.mark.parametrize(
    "changes", [{"n_layer": 6}, {"vocab_size": 512}, {"n_positions": 64}, {"n_embd": 128}]
)
def test_config_and_weights_that_contradict_each_other(
    changes: dict[str, int], refused: Callable[..., str], model: Path
) -> None:
    edit_config(model, **changes)
    assert "transformer." in refused("-m", model)


def test_a_weight_that_is_missing_is_named(refused: Callable[..., str], model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["transformer.h.1.ln_1.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "transformer.h.1.ln_1.weight" in refused("-m", model)


def test_weights_that_nothing_uses_are_said(loftq: Loftq, model: Path, tmp_path: Path) -> None:
    edit_config(model, n_layer=3)
    line = ("quantize", "-m", model, "-o", tmp_path / "out", "--rank", 1, "--iterations", 1)
    outcome = loftq(*line, "--quiet")
    assert outcome.code == 0
    assert "transformer.h.3." in outcome.err


def test_config_that_builds_no_model(refused: Callable[..., str], model: Path) -> None:
    edit_config(model, n_head=7)
    assert "config.json" in refused("-m", model)


def test_ctrl_c_keeps_what_is_finished(
    loftq: Loftq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = core_loftq.initialize

    def interrupted(*arguments: object, **settings: object) -> object:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(core_loftq, "initialize", interrupted)
    line = ("quantize", "-o", tmp_path / "out", "--iterations", 1, "--rank", 1)
    outcome = loftq(*line)
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(core_loftq, "initialize", original)
    assert loftq(*line).code == 0


def test_torch_is_not_needed_for_a_dry_run(loftq: Loftq) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from loftq_cli.cli import main\n"
        "code = main(['quantize', '--dry-run', '--json'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes'} & set(sys.modules)\n"
        "sys.exit(code or len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    totals = json.loads(done.stdout)["results"]["totals"]
    real = loftq("quantize", "--dry-run", "--json")
    assert totals == json.loads(real.out)["results"]["totals"]


def test_dry_run_announces_what_the_run_writes(loftq: Loftq, tmp_path: Path) -> None:
    line = ("quantize", "--iterations", 1, "--rank", 4, "--double-quant", "--json")
    announced = json.loads(loftq(*line, "--dry-run").out)["results"]
    written = json.loads(loftq(*line, "-o", tmp_path / "out").out)["results"]
    for key in ("output_bytes", "adapter_bytes", "parameters", "trainable_parameters"):
        assert announced["totals"][key] == written["totals"][key]
    assert [layer["name"] for layer in announced["layers"]] == [
        layer["name"] for layer in written["layers"]
    ]
    assert not torch.cuda.is_available() or written["totals"]["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("dtype", 5), ("dtype", "int8"), ("torch_dtype", "torch.uint8"), ("num_labels", 10**9)],
)
def test_a_config_that_no_library_could_load(
    key: str, value: object, refused: Callable[..., str], model: Path
) -> None:
    edit_config(model, **{key: value})
    assert f"config.json: {key} is " in refused("-m", model)


@pytest.mark.parametrize("dtype", ["torch.float32", "float64", "auto", None])
def test_a_dtype_as_people_write_it(dtype: str | None, model: Path, loftq: Loftq) -> None:
    edit_config(model, dtype=dtype)
    assert loftq("targets", "-q", "-m", model).code == 0
