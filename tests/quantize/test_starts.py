"""Every start at every width, through the files: figures, codes, and what the libraries load."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import loftq_cli
from loftq_cli.core.codebooks import codebook
from tests.conftest import Outcome
from tests.reload import relative_error, reload, weights

DEMO = Path(loftq_cli.__file__).parent / "demo"
CALIBRATED = ("qera", "qera-diagonal", "calibrated")
# Where the figures themselves are not what is tested.
FEW = dict.fromkeys(("loftq", "loftq-plain", "pissa", "calibrated"), ("--iterations", 3))
Results = dict[str, Any]
Loftq = Callable[..., Outcome]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 that the demo's tokenizer speaks to."""
    directory = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=4096,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    # Inputs that differ in size and go together, as those of a trained model do.
    for block in model.transformer.h:
        block.ln_1.weight.data = torch.rand(64) * 3
        block.ln_2.weight.data = torch.rand(64) * 3
    model.to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text((DEMO / "calibration.txt").read_text("utf-8")[:8_000], "utf-8")
    return path


@pytest.fixture
def quantize(source: Path, text: Path, tmp_path: Path, loftq: Loftq) -> Callable[..., Path]:
    def run(init: str, *options: object, name: str = "out") -> Path:
        more = ("--calibration-text", text) if init in CALIBRATED else ()
        line = ("quantize", "-m", source, "-o", tmp_path / name, "--rank", 4, "--init", init)
        outcome = loftq(*line, *more, *options)
        assert outcome.code == 0, outcome.err
        return tmp_path / name

    return run


def results(directory: Path) -> Results:
    document: Results = json.loads((directory / "loftq_report.json").read_text("utf-8"))["results"]
    return document


def remeasured(source: Path, directory: Path) -> dict[str, float]:
    original = weights(AutoModelForCausalLM.from_pretrained(source))
    found = reload(directory)
    held = found.dequantized or original
    return {
        name: relative_error(original[name], held[name] + correction)
        for name, correction in found.correction.items()
    }


@pytest.mark.parametrize(
    ("init", "bits"),
    [
        ("loftq", 4),
        ("loftq", 2),
        ("loftq-plain", 3),
        ("qlora", 2),
        ("pissa", 3),
        ("qera", 4),
        ("qera-diagonal", 2),
        ("calibrated", 4),
        ("calibrated", 2),
    ],
)
def test_figures_are_those_of_the_files(
    init: str, bits: int, quantize: Callable[..., Path], source: Path, loftq: Loftq
) -> None:
    out = quantize(init, "--bits", bits, *FEW.get(init, ()))
    document = results(out)
    measured = remeasured(source, out)
    assert len(measured) == 8
    for layer in document["layers"]:
        assert layer["bits"] == bits
        assert measured[layer["name"]] == pytest.approx(layer["weight_error_relative"], abs=1e-5)
        curve = layer["error_curve"]
        if init != "loftq-plain":
            assert curve == sorted(curve, reverse=True)
        assert (layer["output_error_relative"] is not None) == (init in CALIBRATED)
    totals = document["totals"]
    assert totals["stored_bits"] > 4.5  # codes, scales, and the table of levels
    assert totals["stored_bits"] - totals["information_bits"] == pytest.approx(4 - bits)
    verified = loftq("verify", out, "--source", source)
    assert verified.code == 0, verified.err


@pytest.mark.parametrize(("init", "bits"), [("loftq", 2), ("qlora", 3), ("calibrated", 2)])
def test_few_bits_use_few_codes(init: str, bits: int, quantize: Callable[..., Path]) -> None:
    from safetensors.torch import load_file

    out = quantize(init, "--bits", bits, "--double-quant", *FEW.get(init, ()))
    tensors = load_file(out / "model.safetensors")
    allowed = set(codebook("nf4", bits).order)
    coded = [name.removesuffix(".absmax") for name in tensors if name.endswith("weight.absmax")]
    assert len(coded) == 8
    for name in coded:
        packed = tensors[name]
        assert set(torch.cat((packed >> 4, packed & 15)).unique().tolist()) <= allowed


def test_better_starts_leave_less_in_the_outputs(quantize: Callable[..., Path]) -> None:
    left = {}
    for init in CALIBRATED:
        totals = results(quantize(init, "--bits", 2, name=init))["totals"]
        left[init] = totals["output_error_relative"]
        plain = totals["quantized_only_output_error_relative"]
        assert left[init] < plain
    assert left["calibrated"] < 0.9 * left["qera"] < 0.9 * left["qera-diagonal"]


def test_the_output_error_is_that_of_the_outputs(
    quantize: Callable[..., Path], source: Path, text: Path
) -> None:
    """‖(W − Q − s·B·A)·X‖ / ‖W·X‖ with the inputs of every token that was looked at."""
    layer = "transformer.h.1.mlp.c_fc"
    options = ("--calibration-order", "parallel", *FEW["calibrated"])
    out = quantize("calibrated", "--lora-alpha", 11, *options)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    ids = torch.tensor(tokenizer(text.read_text("utf-8"))["input_ids"])
    windows = ids[: len(ids) // 64 * 64].view(-1, 64)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    module = model.get_submodule(layer)
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        model(windows)
    X, W = seen[0].double().T, module.weight.detach().double().T
    found = reload(out)
    rest = W - found.dequantized[layer] - found.correction[layer]
    expected = float((rest @ X).norm() / (W @ X).norm())
    (told,) = [each for each in results(out)["layers"] if each["name"] == layer]
    assert told["output_error_relative"] == pytest.approx(expected, rel=0.02)


def test_lora_leaves_the_weights_and_starts_at_the_original(
    quantize: Callable[..., Path], source: Path, loftq: Loftq
) -> None:
    from safetensors.torch import load_file

    out = quantize("lora")
    before, after = (load_file(each / "model.safetensors") for each in (source, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    document = results(out)
    assert {layer["bits"] for layer in document["layers"]} == {16}
    assert document["totals"]["weight_error_relative"] == 0
    found = reload(out)
    assert len(found.correction) == 8
    assert all(not correction.any() for correction in found.correction.values())
    tokens = torch.arange(24).view(2, 12)
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    assert torch.equal(found.model(tokens).logits, original(tokens).logits)
    assert loftq("verify", out, "--source", source).code == 0


def test_the_first_blocks_in_more_bits(quantize: Callable[..., Path]) -> None:
    document = results(quantize("loftq", "--bits", "4x1,2"))
    bits = {layer["name"]: layer["bits"] for layer in document["layers"]}
    assert {b for name, b in bits.items() if ".h.0." in name} == {4}
    assert {b for name, b in bits.items() if ".h.1." in name} == {2}
    totals = document["totals"]
    assert totals["stored_bits"] - totals["information_bits"] == pytest.approx(1)
    errors = {layer["name"]: layer["weight_error_relative"] for layer in document["layers"]}
    assert errors["transformer.h.0.mlp.c_fc"] < errors["transformer.h.1.mlp.c_fc"]


@pytest.mark.parametrize(
    "init",
    ["loftq", "loftq-plain", "qlora", "lora", "pissa", "qera", "qera-diagonal", "calibrated"],
)
def test_layers_without_an_adapter_hold_their_weight(
    init: str, quantize: Callable[..., Path], source: Path, loftq: Loftq
) -> None:
    """Nothing that they lost to a low rank would ever come back."""
    out = quantize(init, "--target-modules", "c_attn", *FEW.get(init, ()))
    document = results(out)
    original = weights(AutoModelForCausalLM.from_pretrained(source))
    held = reload(out).dequantized or original
    assert len(document["without_adapter"]) == 6
    for layer in document["without_adapter"]:
        measured = relative_error(original[layer["name"]], held[layer["name"]])
        assert measured == pytest.approx(layer["weight_error_relative"], abs=1e-5)
    verified = loftq("verify", out, "--source", source)
    assert verified.code == 0, verified.err


def test_layers_without_an_adapter_are_calibrated_too(quantize: Callable[..., Path]) -> None:
    options = ("--target-modules", "c_attn", *FEW["calibrated"])
    document = results(quantize("calibrated", *options))
    assert len(document["layers"]) == 2
    for layer in document["without_adapter"]:
        before = layer["quantized_only_output_error_relative"]
        assert layer["output_error_relative"] < before


def test_auto_stops_by_itself(quantize: Callable[..., Path]) -> None:
    counts = [layer["iterations"] for layer in results(quantize("loftq"))["layers"]]
    assert all(2 < count <= 50 for count in counts)
    fixed = results(quantize("loftq", "--iterations", 2, name="two"))["layers"]
    assert [layer["iterations"] for layer in fixed] == [2] * 8


def test_the_same_line_gives_the_same_bytes(quantize: Callable[..., Path]) -> None:
    one, two = (
        quantize("calibrated", "--bits", 3, *FEW["calibrated"], name=name)
        for name in ("one", "two")
    )
    for name in ("model.safetensors", "loftq_init/adapter_model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        (" \n\t ", "is empty"),
        ("too short", "is too short"),
        ("\0" * 9000, "is not a text file"),
        (b"\xff\xfe\x00" * 3000, "is not a text file"),
    ],
)
def test_texts_that_cannot_be_used(
    content: str | bytes, says: str, source: Path, tmp_path: Path, loftq: Loftq
) -> None:
    text = tmp_path / "text"
    text.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = ("quantize", "-m", source, "-o", tmp_path / "out", "--init", "calibrated")
    outcome = loftq(*line, "--rank", 4, "--calibration-text", text)
    assert outcome.code in (1, 2)
    assert says in outcome.err
    assert outcome.out == ""
    assert not (tmp_path / "out").exists()


def test_activations_that_are_no_numbers(
    source: Path, text: Path, tmp_path: Path, loftq: Loftq
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.transformer.h[1].ln_2.bias.data[3] = math.nan
    model.save_pretrained(broken)
    line = ("quantize", "-m", broken, "-o", tmp_path / "out", "--init", "calibrated", "--rank", 4)
    line = ("quantize", "-m", broken, "-o", tmp_path / "out", "--init", "calibrated", "--rank", 4)
    outcome = loftq(*line, "--calibration-text", text, "--iterations", 1)
    assert outcome.code == 1
    assert "transformer.h.1.mlp.c_fc" in outcome.err
    assert "NaN" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_does_not_say_what_is_yet_to_be_measured(source: Path, loftq: Loftq) -> None:
    line = ("quantize", "-m", source, "--dry-run", "--json", "--rank", 4)
    outcome = loftq(*line, "--target-bits", 2.5, "--rank-budget")
    document = json.loads(outcome.out)["results"]
    assert {(layer["bits"], layer["rank"]) for layer in document["layers"]} == {(None, None)}
    totals = document["totals"]
    assert totals["stored_bits"] - totals["information_bits"] == pytest.approx(1.5)
    for form in ("table", "tsv", "md"):
        outcome = loftq(*line[:-3], "--rank", 4, "--rank-budget", "--format", form)
        assert outcome.code == 0, outcome.err
    document = json.loads(loftq(*line).out)["results"]
    assert {(layer["bits"], layer["rank"]) for layer in document["layers"]} == {(4, 4)}


def interrupted(source: Path, text: Path, out: Path, loftq: Loftq) -> tuple[object, ...]:
    """A run that ended after its first file; the line that goes on with it."""
    from loftq_cli.engines import tasks

    line = ("quantize", "-m", source, "-o", out, "--init", "calibrated", "--rank", 4)
    line = (*line, "--calibration-text", text, "--iterations", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loftq_cli.engines.shards.SHARD_BYTES", 20_000)
        real, calls = tasks.write_behind, []

        def failing(*args: Any) -> Any:
            calls.append(args)
            if len(calls) > 2:
                raise KeyboardInterrupt
            return real(*args)

        patch.setattr(tasks, "write_behind", failing)
        assert loftq(*line).code == 130
    return line


def test_another_tokenizer_does_not_go_on_with_a_run(
    source: Path, text: Path, tmp_path: Path, loftq: Loftq
) -> None:
    """The moments are those of other tokens then."""
    model = tmp_path / "model"
    shutil.copytree(source, model)
    line = interrupted(model, text, tmp_path / "out", loftq)
    settings = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"add_prefix_space": True}))
    outcome = loftq(*line)
    assert outcome.code == 1
    assert "tokenizer" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_text_that_changes_while_it_is_used(
    source: Path, text: Path, tmp_path: Path, loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loftq_cli.models import calibration

    changing = tmp_path / "text"
    shutil.copy(text, changing)
    real = calibration.open_calibration

    def later(*args: Any, **options: Any) -> Any:
        changing.write_text(text.read_text("utf-8")[100:], "utf-8")
        return real(*args, **options)

    monkeypatch.setattr(calibration, "open_calibration", later)
    line = ("quantize", "-m", source, "-o", tmp_path / "out", "--init", "calibrated", "--rank", 4)
    outcome = loftq(*line, "--calibration-text", changing)
    assert outcome.code == 1
    assert f"{changing} has changed since the run began" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--init", "calibrated"),
        ("--init", "qera"),
        ("--calibration-text", __file__),
        ("--init", "calibrated", "--calibration-text", "no such file"),
        ("--init", "calibrated", "--calibration-text", __file__, "--bits", 8),
        ("--init", "calibrated", "--calibration-text", __file__, "--svd", "exact"),
        ("--init", "qera", "--calibration-text", __file__, "--iterations", 3),
        ("--init", "lora", "--bits", 2),
        ("--init", "lora", "--iterations", 2),
        ("--init", "qlora", "--rank-budget"),
        ("--uniform-rank",),
        ("--target-bits", 1.5),
        ("--target-bits", 2.5, "--bits", 3),
        ("--target-bits", 2.5, "--quant-type", "fp4"),
        ("--bits", 2, "--quant-type", "fp4"),
        ("--bits", "4x2"),
        ("--bits", "4x0,2"),
        ("--bits", "4x4,2"),  # the demo has four blocks
        ("--bits", "2x2,2"),
        ("--bits", "8x2,4"),
        ("--bits", 5),
        ("--iterations", 0),
        ("--iterations", "many"),
    ],
    ids=lambda options: " ".join(str(each).rpartition("/")[2] for each in options),
)
def test_options_that_mean_nothing_are_refused(
    options: tuple[object, ...], tmp_path: Path, loftq: Loftq
) -> None:
    outcome = loftq("quantize", "-o", tmp_path / "out", *options)
    assert outcome.code in (1, 2)
    assert outcome.err.startswith("error: ")
    assert not (tmp_path / "out").exists()
