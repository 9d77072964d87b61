"""Calibrated in sequence, through the files: figures, going on after a kill, and what it gains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import loftq_cli
from loftq_cli import quantize
from loftq_cli.engines import shards, tasks
from loftq_cli.engines.settings import Settings, settings_of
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.options import QuantizeOptions
from tests.battery import BATTERY, Entry
from tests.conftest import Outcome
from tests.quantize.test_killed import contents, kill_and_rerun
from tests.reload import reload

DEMO = Path(loftq_cli.__file__).parent / "demo"
WINDOW = 64
BLOCKS = 3
OPTIONS: dict[str, Any] = {"init": "calibrated", "rank": 4, "iterations": 2, "bits": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text((DEMO / "calibration.txt").read_text("utf-8")[:6_000], "utf-8")
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a model of this kind whose layers' inputs differ in size."""
    root = tmp_path_factory.mktemp("models")
    depth = {"llama": "num_hidden_layers", "gpt2": "n_layer", "t5": "num_layers"}

    def save(name: str) -> Path:
        directory = root / name
        if not directory.exists():
            entry = BATTERY[name]
            config = {**entry.config, "vocab_size": 4096, depth[name]: BLOCKS}
            model = Entry(entry.model_class, entry.config_class, config).build()
            generator = torch.Generator().manual_seed(0)
            for each, parameter in model.named_parameters():
                if "norm" in each or ".ln_" in each:
                    parameter.data = torch.rand(parameter.shape, generator=generator) * 3
                elif each.endswith(".bias"):
                    parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
            model.save_pretrained(directory)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(DEMO / file, directory)
        return directory

    return save


@pytest.fixture(autouse=True)
def many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 10_000)
    monkeypatch.setattr("loftq_cli.models.texts.LONGEST_WINDOW", WINDOW)


def results(directory: Path) -> dict[str, Any]:
    document = json.loads((directory / "loftq_report.json").read_text("utf-8"))
    found: dict[str, Any] = document["results"]
    return found


def watched(model: nn.Module, modules: list[str], run: Callable[[], Any]) -> dict[str, Tensor]:
    """What these modules are given while ``run`` runs, as float64 (tokens × in)."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: Any, args: Any, kwargs: Any) -> None:
            x = (args or tuple(kwargs.values()))[0]
            found[name] = x.reshape(-1, x.shape[-1]).double()

        return see

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
        for name in modules
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return found


def remeasured(source: Path, out: Path, text: Path, end: str = "") -> dict[str, float]:
    """√E‖W·x − (Q + s·B·A)·x̃‖² / √E‖W·x‖² of each layer whose name has this ``end``.

    x is what the original gives it, x̃ what the loaded directory does, which plain transformers,
    bitsandbytes and peft run.
    """
    (kind,) = json.loads((source / "config.json").read_text("utf-8"))["architectures"]
    original = getattr(transformers, kind).from_pretrained(source).eval()
    found = reload(out, kind)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ids = torch.tensor(tokenizer(text.read_text("utf-8"))["input_ids"])
    ids = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    inputs = {"input_ids": ids}
    if original.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    linear = [
        name
        for name, module in original.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        if name in found.dequantized and name.endswith(end)
    ]
    before = watched(original, linear, lambda: original(**inputs, use_cache=False))
    tuned = found.model.base_model.model
    now = watched(tuned, linear, lambda: tuned(**inputs, use_cache=False))
    errors = {}
    for name in linear:
        layer: Any = original.get_submodule(name)
        W = layer.weight.detach().double()
        W = W.T if isinstance(layer, Conv1D) else W
        outputs = before[name] @ W.T
        approximation = found.dequantized[name] + found.correction[name]
        errors[name] = float((outputs - now[name] @ approximation.T).norm() / outputs.norm())
    return errors


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_reported_output_errors_are_those_of_the_files(
    name: str, saved: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(str(saved(name)), output=out, calibration_text=text, lora_alpha=7, **OPTIONS)
    document = results(out)
    assert document["settings"]["calibration_order"] == "sequential"
    measured = remeasured(saved(name), out, text)
    told = {layer["name"]: layer["output_error_relative"] for layer in document["layers"]}
    assert measured.keys() == told.keys()
    for module, error in measured.items():
        assert told[module] == pytest.approx(error, rel=1e-3), module


def killed_after(layers: int) -> pytest.MonkeyPatch:
    """The next run is interrupted when so many layers are quantized."""
    patch, count = pytest.MonkeyPatch(), [0]
    real = tasks.initialize

    def failing(*arguments: Any) -> Any:
        if arguments[1].layer.module:  # the first is a small one of no model
            count[0] += 1
            if count[0] > layers:
                raise KeyboardInterrupt
        return real(*arguments)

    patch.setattr(tasks, "initialize", failing)
    return patch


@pytest.mark.parametrize(
    ("name", "container", "files", "moments"),
    [
        ("gpt2", "bitsandbytes", 10_000, (1, 6, 8)),
        ("llama", "gptq", 10_000, (15,)),
        ("gpt2", "bitsandbytes", 1 << 24, (7,)),  # all in one file
    ],
)
def test_interrupted_runs_end_in_the_same_bytes(
    name: str,
    container: str,
    files: int,
    moments: tuple[int, ...],
    saved: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", files)

    def run(place: Path) -> None:
        # Ranks that differ, padded, and of 16 bits: what is read back has to be what was kept.
        options = {**OPTIONS, "iterations": 1}
        quantize(
            str(saved(name)), output=place / "out", calibration_text=text, container=container,
            adapter_dtype="bfloat16", rank_budget=True, uniform_rank=True, **options,
        )  # fmt: skip

    run(tmp_path / "whole")
    expected = contents(tmp_path / "whole" / "out")
    for after in moments:
        place = tmp_path / str(after)
        patch = killed_after(after)
        with pytest.raises(KeyboardInterrupt):
            run(place)
        patch.undo()
        run(place)
        assert contents(place / "out") == expected, after


def test_another_order_does_not_go_on_with_a_run(
    saved: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    asked = {**OPTIONS, "calibration_text": text, "output": tmp_path / "out"}
    patch = killed_after(6)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(saved("gpt2")), **asked)
    patch.undo()
    with pytest.raises(LoftqError, match="unfinished run") as caught:
        quantize(str(saved("gpt2")), calibration_order="parallel", **asked)
    assert "calibration_order" in str(caught.value.cause)


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bytes(
    saved: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    more = ("--init", "calibrated", "--calibration-text", text, "--rank", 4, "--iterations", 2)
    kill_and_rerun(saved("llama"), "bitsandbytes", tmp_path, 4, *more)


def test_it_makes_good_what_layers_before_lost(text: Path, tmp_path: Path) -> None:
    """On the trained weights of the built-in model, in float32, at its end."""
    source = tmp_path / "source"
    transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).save_pretrained(
        source
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, source)
    last, error = "transformer.h.3.mlp.c_proj", {}
    for order in ("sequential", "parallel"):
        out = tmp_path / order
        options: dict[str, Any] = {**OPTIONS, "calibration_order": order, "iterations": 1}
        quantize(str(source), output=out, calibration_text=text, **options)
        error[order] = remeasured(source, out, text, last)[last]
    assert error["sequential"] < 0.95 * error["parallel"]


def test_a_model_in_one_piece_says_that_nothing_comes_before(
    text: Path, tmp_path: Path, loftq: Callable[..., Outcome]
) -> None:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=4096, hidden_size=64, embedding_size=32, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=WINDOW,
    )  # fmt: skip
    transformers.AlbertForMaskedLM(config).save_pretrained(tmp_path / "source")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, tmp_path / "source")
    line = ("quantize", "-m", tmp_path / "source", "--init", "calibrated", "--rank", 4)
    line = (*line, "--calibration-text", text, "--iterations", 1)
    outcome = loftq(*line, "-o", tmp_path / "one")
    assert outcome.code == 0, outcome.err
    assert "runs in one piece only" in outcome.err


def test_the_settings_of_earlier_versions_are_those_of_parallel() -> None:
    text = DEMO / "calibration.txt"

    def asked(**options: Any) -> Settings:
        return settings_of(QuantizeOptions(calibration_text=text, **options))

    sequential = asked(init="calibrated")
    assert sequential.as_dict()["calibration_order"] == "sequential"
    for parallel in (asked(init="calibrated", calibration_order="parallel"), asked(init="qera")):
        assert "calibration_order" not in parallel.as_dict()
    assert sequential == asked(init="calibrated", calibration_order="sequential")


@pytest.mark.parametrize(
    ("init", "says"), [("loftq", "looks at no inputs"), ("qera", "as published")]
)
def test_an_order_that_has_no_effect_is_refused(init: str, says: str) -> None:
    text = None if init == "loftq" else DEMO / "calibration.txt"
    asked = QuantizeOptions(init=init, calibration_text=text, calibration_order="sequential")
    with pytest.raises(UsageError, match="--calibration-order has no effect") as caught:
        settings_of(asked)
    assert says in str(caught.value.cause)
