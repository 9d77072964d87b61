"""`loftq compare`: every start from its files, a verdict from the figures, no text in two roles."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq_cli.commands.compare_plan import DEMO_CALIBRATION, HELDOUT, methods, texts_of
from loftq_cli.errors import UsageError
from loftq_cli.models import evaluation
from loftq_cli.options import CompareOptions
from loftq_cli.report.start_verdict import difference, key, relative_to_qlora, verdict
from loftq_cli.schema import ComparedMethod
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]
Refused = Callable[..., str]
Results = dict[str, Any]


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text("one two three four five six seven eight nine ten\n" * 200)
    return file


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MOST_TOKENS", 1024)


# --- what is measured ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(
    loftq: Loftq, tiny: Path, other_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    """A comparison with training, made once."""
    import json

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "MOST_TOKENS", 1024)
        patch.setenv("TMPDIR", str(scratch := tmp_path_factory.mktemp("scratch")))
        patch.setattr("tempfile.tempdir", None)
        done = loftq(
            "compare", "-m", tiny, "--init", "lora,loftq", "--bits", "4,2", "--ranks", 4,
            "--train-steps", 4, "--train-text", other_text, "--learning-rate", 0.01, "--json",
        )  # fmt: skip
    assert done.code == 0, done.err
    assert list(scratch.iterdir()) == [], "the files are not kept"
    assert "warning: the held-out loss is that of the built-in text" in done.err
    assert "quantizing" not in done.err, "what happens inside is not told"
    document: Results = json.loads(done.out)
    return document


def test_the_methods(trained: Results) -> None:
    found = trained["results"]["methods"]
    assert [(each["init"], each["bits"], each["rank"]) for each in found] == [
        ("original", 32, None),
        ("lora", 32, 4),
        ("qlora", 4, 4),
        ("loftq", 4, 4),
        ("qlora", 2, 4),
        ("loftq", 2, 4),
    ]
    original, lora, *quantized = found
    assert original["stored_bits"] == lora["stored_bits"] == 32
    for each in quantized:  # a code and its share of a float32 scale, and the table of levels
        assert 4.5 < each["stored_bits"] < 4.7
    assert original["kl_divergence"] == 0
    assert lora["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert lora["perplexity"] == pytest.approx(original["perplexity"])
    assert lora["weight_error_relative"] == 0
    assert lora["kl_gain"] is None
    by = {(each["init"], each["bits"]): each for each in quantized}
    for bits in (4, 2):
        qlora, start = by["qlora", bits], by["loftq", bits]
        assert 0 < start["weight_error_relative"] < qlora["weight_error_relative"]
        assert start["error_removed"] == pytest.approx(
            1 - start["weight_error_relative"] / qlora["weight_error_relative"]
        )
        assert start["kl_gain"] == pytest.approx(qlora["kl_divergence"] / start["kl_divergence"])
        assert (qlora["kl_gain"], qlora["error_removed"]) == (1, 0)
        assert start["adapter_bytes"] == qlora["adapter_bytes"] > 0
        assert start["backbone_bytes"] < original["backbone_bytes"]
    assert by["qlora", 2]["kl_divergence"] > by["qlora", 4]["kl_divergence"]


def test_the_training(trained: Results, tiny: Path) -> None:
    settings = trained["results"]["settings"]
    assert settings["train_steps"] == 4
    assert settings["learning_rate"] == 0.01
    assert settings["text"] == "built-in"
    assert settings["window_tokens"] == 32
    assert settings["predicted_tokens"] == 32 * 31
    original, *rest = trained["results"]["methods"]
    assert original["loss_curve"] == []
    assert original["heldout_loss_after"] is None
    for each in rest:
        assert [point["step"] for point in each["loss_curve"]] == [1, 2, 3, 4]
        assert each["loss_curve"][-1]["heldout_loss"] == each["heldout_loss_after"]
        losses = [point["train_loss"] for point in each["loss_curve"]]
        assert losses[-1] < losses[0]
        assert each["heldout_loss_before"] == pytest.approx(math.log(each["perplexity"]), rel=1e-3)
    told = trained["results"]["verdict"]
    assert [part["bits"] for part in told["bits"]] == [4, 2]
    assert all(part["sentence"] in told["sentence"] for part in told["bits"])
    assert told["sentence"].endswith(
        "One seed and one learning rate: others may order the starts otherwise."
    )


def test_the_original_is_what_transformers_says(trained: Results, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer(HELDOUT.read_text("utf-8"), verbose=False)["input_ids"]
    whole = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    chosen = whole[torch.linspace(0, len(whole) - 1, 32).round().long()]
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(tiny)(input_ids=chosen, labels=chosen).loss
    perplexity = trained["results"]["methods"][0]["perplexity"]
    assert perplexity == pytest.approx(float(loss.exp()), rel=1e-4)


def test_in_every_form(loftq: Loftq, tiny: Path) -> None:
    done = loftq("compare", "-m", tiny, "--init", "qlora", "--ranks", 2, "--format", "table")
    assert done.code == 0, done.err
    assert "Distance from the original" in done.out
    assert "Held-out loss" not in done.out
    assert "no gain here: no start is nearer to the original than QLoRA" in " ".join(
        done.out.split()
    )
    assert "note: evaluated on Python code" in done.err
    done = loftq("compare", "-m", tiny, "--init", "qlora", "--ranks", 2, "--bits", "3")
    rows = list(csv.DictReader(done.out.splitlines(), delimiter="\t"))
    assert [(row["init"], row["bits"]) for row in rows] == [("original", "32"), ("qlora", "3")]


# --- what is planned ----------------------------------------------------------------------------


def planned(init: str | None, bits: str, ranks: str, **changes: Any) -> list[tuple[Any, ...]]:
    asked = CompareOptions(
        **{"model": "gpt2", "init": init, "bits": bits, "ranks": ranks, **changes}
    )
    found = methods(asked, texts_of(asked))
    return [(each.init, each.bits, each.rank) for each in found]


def test_all_that_need_no_text_by_default() -> None:
    starts = ["qlora", "loftq-plain", "loftq", "pissa"]
    assert planned(None, "4", "16") == [(each, 4, 16) for each in starts]
    inits = [each[0] for each in planned(None, "4", "16", model="demo")]
    assert inits == [*starts, "qera", "calibrated"]
    inits = [each[0] for each in planned(None, "8", "16", model="demo")]
    assert inits == starts, "8 bits have no calibrated starts"


def test_plain_lora_is_there_when_there_is_training(other_text: Path) -> None:
    found = planned(None, "4,2", "4,8", train_text=other_text, train_steps=5)
    assert found[:2] == [("lora", 16, 4), ("lora", 16, 8)]
    assert [each for each in found if each[0] == "qlora"] == [
        ("qlora", 4, 4), ("qlora", 4, 8), ("qlora", 2, 4), ("qlora", 2, 8),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="nothing to show without training"):
        planned("lora", "4", "4")


def test_qlora_is_always_there() -> None:
    assert planned("loftq", "4", "8") == [("qlora", 4, 8), ("loftq", 4, 8)]


@pytest.mark.parametrize(
    ("line", "says", "hint"),
    [
        ("--init loftq,nonsense", "there is no start 'nonsense'", "--init loftq,"),
        ("--bits 5", "--bits takes 2, 3, 4 and 8", "--bits 4,2"),
        ("--ranks 0", "--ranks takes whole numbers from 1", ""),
        ("-m gpt2 --init calibrated", "has to see what", "--calibration-text FILE"),
        ("--train-steps 3", "nothing to train on", "--train-text FILE"),
        ("--train-text x.txt", "no effect without steps", "--train-steps 100"),
        ("--learning-rate 0.1", "no effect here", "--train-steps 100"),
        ("--train-steps 3 --train-text x --learning-rate 0", "not above 0", "0.0004"),
        ("--bits 2 --quant-type fp4", "fp4 has 4 bits only", "nf4"),
        (f"--text {HELDOUT} --calibration-text {HELDOUT}", "are the same text", "another file"),
        (f"--init loftq --calibration-text {__file__}", "has no effect", "--init calibrated"),
        ("--init qlora --iterations 5", "--iterations has no effect", "--init loftq"),
        ("--bits 8 --init loftq --double-quant", "8 bits have no", ""),
        (f"--text {DEMO_CALIBRATION} --init qera", "has to see what", "--calibration-text FILE"),
        (f"--train-steps 1 --train-text {HELDOUT}", "are the same text", "another file"),
    ],
)
def test_lines_that_mean_nothing(refused: Refused, line: str, says: str, hint: str) -> None:
    error = refused("compare", *line.split(), code=2)
    assert says in error
    assert hint in error


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
    ],
    ids=["copied", "with a byte-order mark", "with other line ends"],
)
def test_a_copy_of_a_text_is_the_same_text(
    change: Callable[[str], str], refused: Refused, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(change(HELDOUT.read_text("utf-8")).encode())
    assert "the same text" in refused("compare", "--calibration-text", copy, code=2)


def test_a_method_that_cannot_be_is_refused_before_the_first_is_made(
    refused: Refused, tiny: Path
) -> None:
    error = refused("compare", "-m", tiny, "--init", "loftq", "--ranks", "4,65")
    assert "rank 65 is too large" in error
    assert "hint: --ranks 64" in error
    assert "comparing: 2/" not in error


def test_training_that_diverges_does_not_end_the_comparison(
    loftq: Loftq, tiny: Path, other_text: Path
) -> None:
    import json

    done = loftq(
        "compare", "-m", tiny, "--init", "loftq", "--ranks", 4, "--train-steps", 2,
        "--train-text", other_text, "--learning-rate", 1e30, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "warning: loftq, 4 bits, rank 4: training diverged" in done.err
    results = json.loads(done.out)["results"]
    assert [each["heldout_loss_after"] for each in results["methods"]] == [None] * 3
    assert results["methods"][2]["kl_divergence"] > 0


def test_texts_and_models_that_cannot_be_used(
    refused: Refused, tiny: Path, tmp_path: Path, demo: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a b")
    error = refused("compare", "-m", tiny, "--text", short)
    assert f"{short} is too short" in error
    assert "cannot be read" in refused("compare", "-m", tiny, "--text", tmp_path / "none.txt")
    config = (demo / "config.json").read_text().replace("GPT2LMHeadModel", "GPT2Model")
    (demo / "config.json").write_text(config)
    assert "GPT2Model does not predict the next token" in refused("compare", "-m", demo)


def test_nothing_is_measured_against_a_broken_original(
    refused: Refused, tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "broken")
    weights = load_file(tiny / "model.safetensors")
    weights["transformer.ln_f.weight"][0] = float("nan")
    save_file(weights, tmp_path / "broken/model.safetensors", {"format": "pt"})
    error = refused("compare", "-m", tmp_path / "broken", "--init", "qlora")
    assert f"what {tmp_path / 'broken'} predicts on {HELDOUT} is no number" in error


# --- the verdict --------------------------------------------------------------------------------


def method(init: str, kl: float | None, bits: int = 4, **changes: Any) -> ComparedMethod:
    given = {
        "init": init, "bits": bits, "stored_bits": max(4, bits), "rank": 8,
        "weight_error_relative": 0.1, "kl_divergence": kl, "perplexity": 9.0, "backbone_bytes": 1,
        "adapter_bytes": 1, "trainable_parameters": 1, "seconds": 1.0, **changes,
    }  # fmt: skip
    return ComparedMethod.model_validate(given)


ORIGINAL = method("original", 0.0, 16, rank=None)


def decide(*found: ComparedMethod, losses: Any = None) -> Any:
    return verdict(relative_to_qlora([ORIGINAL, *found]), losses or {})


def test_the_nearest_start_with_its_factors() -> None:
    told = decide(
        method("qlora", 0.01), method("loftq-plain", 0.008), method("calibrated", 0.004),
        method("qlora", 0.8, 2), method("calibrated", 0.9, 2),
    )  # fmt: skip
    four, two = told.bits
    assert (four.init, four.rank, four.gain) == ("calibrated", 8, True)
    assert (four.kl_gain, four.kl_gain_over_plain_loftq) == (2.5, 2.0)
    assert four.sentence == (
        "At 4 bits calibrated at rank 8 is nearest to the original: KL 0.004, 2.50 × nearer than "
        "QLoRA (0.01) and 2.00 × nearer than LoftQ as published (0.008)."
    )
    assert (two.init, two.gain) == ("qlora", False)
    assert two.sentence == (
        "At 2 bits no gain here: no start is nearer to the original than QLoRA (KL 0.8)."
    )
    assert told.sentence == f"{four.sentence} {two.sentence}"


def test_less_than_two_percent_is_no_gain() -> None:
    told = decide(method("qlora", 0.0100), method("loftq", 0.0099))
    assert not told.bits[0].gain
    assert told.sentence == (
        "At 4 bits no gain here: the nearest start, loftq at rank 8, has KL 0.0099, within 2 % of "
        "QLoRA's 0.01."
    )
    assert decide(method("qlora", 0.0100), method("loftq", 0.0097)).bits[0].gain


def test_figures_that_are_no_numbers() -> None:
    told = decide(method("qlora", None), method("loftq", 0.5))
    assert (told.bits[0].init, told.bits[0].kl_gain) == ("loftq", None)
    assert "that of QLoRA is no number" in told.sentence
    assert "nothing can be said" in decide(method("qlora", None)).sentence
    best = decide(method("qlora", 0.1), method("loftq", 0.0))
    assert best.bits[0].gain


def trained_method(init: str, after: float | None, bits: int = 4) -> ComparedMethod:
    return method(init, 0.01, bits, heldout_loss_after=after)


def test_training_is_judged_by_the_windows() -> None:
    lora, qlora = trained_method("lora", 2.2, 16), trained_method("qlora", 2.5)
    loftq = trained_method("loftq", 2.4)
    clear = {key(qlora): [2.4, 2.5, 2.6], key(loftq): [2.301, 2.4, 2.499]}
    told = decide(lora, qlora, loftq, losses=clear)
    assert told.bits[0].trained_init == "loftq"
    assert told.bits[0].trained_gain is True
    assert told.bits[0].trained_margin == pytest.approx(0.1)
    assert (
        "Trained, loftq at rank 8 ends lowest at a held-out loss of 2.4000, 0.1000 below QLoRA "
        "(standard error 0.0006); 16-bit LoRA ends at 2.2000."
    ) in told.sentence
    assert told.sentence.endswith(
        "One seed and one learning rate: others may order the starts otherwise."
    )
    noisy = {key(qlora): [2.4, 2.5, 2.6], key(loftq): [2.1, 2.5, 2.6]}
    told = decide(qlora, loftq, losses=noisy)
    assert told.bits[0].trained_gain is False
    assert "within the noise: no gain here" in told.sentence
    diverged = trained_method("qlora", None)
    told = decide(diverged, loftq, losses={key(loftq): [2.1, 2.5, 2.6]})
    assert "nothing can be said: the training of QLoRA diverged" in told.sentence
    told = decide(qlora, trained_method("loftq", 2.6), losses=noisy)
    assert told.bits[0].trained_init == "qlora"
    assert "no start ends below QLoRA (2.5000)" in told.sentence


def test_the_standard_error_of_paired_differences() -> None:
    mean, error = difference([3.0, 5.0, 8.0], [2.0, 3.0, 5.0])
    assert mean == pytest.approx(2)
    assert error == pytest.approx(1 / math.sqrt(3))
    assert difference([2.0], [1.0]) == (1.0, None)
