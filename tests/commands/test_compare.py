"""`loftq compare`: every start from its files, a verdict from the figures, no text in two roles."""

from __future__ import annotations

import csv
import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq_cli.commands import compare_run
from loftq_cli.commands.compare_plan import (
    DEFAULT_SEEDS,
    DEMO_CALIBRATION,
    HELDOUT,
    TrainingPlan,
    methods,
    texts_of,
    training_of,
)
from loftq_cli.commands.compare_rates import LADDER
from loftq_cli.commands.compare_train import forecast
from loftq_cli.errors import UsageError
from loftq_cli.models import evaluation
from loftq_cli.models.spec import DEMO_DIRECTORY
from loftq_cli.options import LARGEST_SEED, CompareOptions
from loftq_cli.report.start_verdict import difference, key, relative_to_qlora, verdict
from loftq_cli.schema import ComparedMethod, Training
from tests.conftest import Outcome
from tests.experts import save

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
            "--train-steps", 4, "--train-text", other_text, "--learning-rate", "0.012,0.01",
            "--seeds", 2, "--json",
        )  # fmt: skip
    assert done.code == 0, done.err
    assert list(scratch.iterdir()) == [], "the files are not kept"
    assert "warning: the held-out loss is that of the built-in text" in done.err
    assert "quantizing" not in done.err, "what happens inside is not told"
    told = next(line for line in done.err.splitlines() if line.startswith("note: 5 starts"))
    assert (
        "to fine-tune for 4 steps, each at the best it finds of 2 learning rates from 0.01 to "
        "0.012 and there with 1 more seed: about "
    ) in told
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


def test_the_training(trained: Results) -> None:
    settings = trained["results"]["settings"]
    assert settings["train_steps"] == 4
    assert settings["learning_rate"] is None
    assert settings["text"] == "built-in"
    assert settings["window_tokens"] == 32
    assert settings["predicted_tokens"] == 32 * 31
    assert (settings["batch_windows"], settings["warmup_steps"]) == (8, 0)
    assert settings["training"] == {
        "learning_rates": [0.01, 0.012],
        "seeds": [0, 1],
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    original, *rest = trained["results"]["methods"]
    assert original["loss_curve"] == original["runs"] == []
    assert original["heldout_loss_after"] is original["learning_rate"] is None
    for each in rest:
        *searched, other = each["runs"]
        first, second = sorted(searched, key=lambda run: float(run["learning_rate"]))
        assert [(run["learning_rate"], run["seed"]) for run in (first, second)] == [
            (0.01, 0), (0.012, 0),
        ]  # fmt: skip
        assert (other["learning_rate"], other["seed"]) == (each["learning_rate"], 1)
        best = first if each["learning_rate"] == 0.01 else second
        assert each["rate_at_end"] in (None, "lowest" if best is first else "highest")
        ended = [run for run in (first, second) if run["ended"] == "finished"]
        assert best["heldout_loss_after"] == min(run["heldout_loss_after"] for run in ended)
        for kind in ("quarter", "after"):
            mean = (best[f"heldout_loss_{kind}"] + other[f"heldout_loss_{kind}"]) / 2
            assert each[f"heldout_loss_{kind}"] == pytest.approx(mean)
        spread = abs(best["heldout_loss_after"] - other["heldout_loss_after"]) / math.sqrt(2)
        assert each["heldout_loss_spread"] == pytest.approx(spread)
        assert best["heldout_loss_after"] != other["heldout_loss_after"]
        assert each["loss_curve"] == best["loss_curve"]
        assert [point["step"] for point in each["loss_curve"]] == [1, 2, 3, 4]
        assert each["loss_curve"][0]["heldout_loss"] == best["heldout_loss_quarter"]
        assert each["loss_curve"][-1]["heldout_loss"] == best["heldout_loss_after"]
        losses = [point["train_loss"] for point in each["loss_curve"]]
        assert losses[-1] < losses[0]
        # The first seed's; another seed's adapter is hardly another model.
        assert each["heldout_loss_before"] == pytest.approx(math.log(each["perplexity"]), rel=0.01)
        assert each["train_seconds"] == pytest.approx(sum(run["seconds"] for run in each["runs"]))
    told = trained["results"]["verdict"]
    assert [part["bits"] for part in told["bits"]] == [4, 2]
    assert all(part["sentence"] in told["sentence"] for part in told["bits"])
    assert "Trained, " in told["bits"][0]["sentence"]
    assert "One learning rate" not in told["sentence"]
    assert "One seed" not in told["sentence"]


def test_by_default_every_start_finds_its_own_rate(
    loftq: Loftq, tiny: Path, other_text: Path, tmp_path: Path
) -> None:
    import json

    done = loftq(
        "compare", "-m", tiny, "--init", "qlora", "--ranks", 2, "--train-steps", 1,
        "--train-text", other_text, "--seeds", 1, "--format", "table", "--save", tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "the best it finds of 7 learning rates from 0.0001 to 0.008: about " in done.err
    shown = " ".join(done.out.split())
    assert "each start's best learning rate of 0.0001 to 0.008, linear decay" in shown
    assert "One seed: what others would give is not known." in shown
    document = json.loads(next(tmp_path.glob("*.json")).read_text())
    method = document["results"]["methods"][1]
    assert f"{method['learning_rate']:g}" in shown
    tried = [run["learning_rate"] for run in method["runs"]]
    best = LADDER.index(method["learning_rate"])
    assert tried[0] == 1e-3, "from the middle"
    assert set(LADDER[max(0, best - 1) : best + 2]) <= set(tried)


def test_a_run_is_the_same_whatever_was_run_before(
    loftq: Loftq, tiny: Path, other_text: Path, trained: Results
) -> None:
    """Every run begins where the files say, not where the last one ended."""
    import json

    done = loftq(
        "compare", "-m", tiny, "--init", "lora", "--ranks", 4, "--train-steps", 4,
        "--train-text", other_text, "--learning-rate", 0.01, "--seeds", 1, "--json",
    )  # fmt: skip
    results = json.loads(done.out)["results"]
    assert results["settings"]["learning_rate"] == 0.01
    assert results["verdict"]["sentence"].endswith(
        "One learning rate for all: at its own best a start may end elsewhere. One seed: what "
        "others would give is not known."
    )
    assert results["methods"][1]["rate_at_end"] is None
    alone = results["methods"][1]["runs"][0]
    beside = next(
        run
        for run in trained["results"]["methods"][1]["runs"]
        if (run["learning_rate"], run["seed"]) == (0.01, 0)
    )
    assert beside["loss_curve"] == alone["loss_curve"]


def test_one_model_is_trained_at_a_time(
    loftq: Loftq, tiny: Path, other_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU there may be no room for another one."""
    models: list[weakref.ref[Any]] = []

    class Watched(compare_run.Trainee):
        def __init__(self, model: Any, windows: Any, heldout: Any) -> None:
            assert [each for each in models if each() is not None] == []
            models.append(weakref.ref(model))
            super().__init__(model, windows, heldout)

    monkeypatch.setattr(compare_run, "Trainee", Watched)
    done = loftq(
        "compare", "-m", tiny, "--init", "lora,qlora", "--ranks", 2, "--train-steps", 1,
        "--train-text", other_text, "--learning-rate", 0.01, "--seeds", 2,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert len(models) == 4


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


def test_help_names_the_rates_and_seeds_that_are_planned(loftq: Loftq) -> None:
    told = " ".join(loftq("compare", "--help").out.split())
    assert f"own best from {LADDER[0]:g} to {LADDER[-1]:g})]" in told
    assert f"from --seed on. [default: ({DEFAULT_SEEDS}); 1<=x<=1000]" in told


def test_the_training_that_is_planned(other_text: Path) -> None:
    def plan(**given: Any) -> Any:
        return training_of(CompareOptions(train_steps=5, train_text=other_text, **given))

    assert training_of(CompareOptions()) is None
    usual = plan()
    assert (usual.rates, usual.seeds) == (LADDER, (0, 1))
    listed = plan(learning_rate="1e-3, 2e-4,0.001", seed=7, seeds=3)
    assert (listed.rates, listed.seeds) == ((2e-4, 1e-3), (7, 8, 9))


def test_the_plan_is_told_with_its_seconds() -> None:
    """A pass over 128 windows takes 4 s; 200 steps see 1600 windows, forth and twice as long back.

    So a run takes 4 · (3 · 1600 / 128 + 2) = 158 s, with its two looks at the held-out text.
    """
    usual = TrainingPlan(steps=200, rates=LADDER, seeds=(0, 1))
    assert forecast(usual, 7, 128, 4.0) == (
        "7 starts to fine-tune for 200 steps, each at the best it finds of 7 learning rates from "
        "0.0001 to 0.008 and there with 1 more seed: about 2 min 38 s a run, 4.5 of them a start, "
        "1 h 22 min in all"
    )
    single = TrainingPlan(steps=1, rates=(1e-3,), seeds=(0,))
    assert forecast(single, 1, 8, 1.0) == (
        "1 start to fine-tune for 1 step, each at learning rate 0.001: about 5.00 s a run, 1 of "
        "them a start, 5.00 s in all"
    )


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


def grids(**changes: Any) -> list[tuple[Any, ...]]:
    asked = CompareOptions(**{"model": "gpt2", "init": "loftq", **changes})
    found = methods(asked, texts_of(asked))
    assert [each.init for each in found] == ["qlora", "loftq"] * (len(found) // 2)
    return [(each.container.name, each.bits, each.container.block_size) for each in found[::2]]


def test_every_combination_that_there_is() -> None:
    both = "bitsandbytes, gptq"
    assert grids() == [("bitsandbytes", 4, 64)]
    assert grids(container=both, bits="4,2", block_size="32,-1,256") == [
        ("bitsandbytes", 4, 32), ("bitsandbytes", 4, 256), ("gptq", 4, 32), ("gptq", 4, -1),
        ("bitsandbytes", 2, 32), ("bitsandbytes", 2, 256), ("gptq", 2, 32), ("gptq", 2, -1),
    ]  # fmt: skip
    # bitsandbytes' 8 bits have no blocks; double quantization is for its 4 bits alone.
    assert grids(container=both, bits="8", block_size="64,128") == [
        ("bitsandbytes", 8, None), ("gptq", 8, 64), ("gptq", 8, 128),
    ]  # fmt: skip
    asked = CompareOptions(model="gpt2", container=both, double_quant=True, init="loftq")
    found = methods(asked, texts_of(asked))
    assert [each.double_quant for each in found] == [True, True, False, False]
    calibrated = grids(container="gptq", bits="8", model="demo")
    assert calibrated == [("gptq", 8, 64)]


def test_experts_both_ways() -> None:
    asked = CompareOptions(model="gpt2", container="compressed-tensors", experts="keep,quantize")
    found = methods(asked, texts_of(asked))
    assert [each.experts for each in found if each.init == "qlora"] == ["keep", "quantize"]
    with pytest.raises(UsageError, match="nothing loads quantized experts in bitsandbytes"):
        grids(bits="8", experts="quantize")
    assert grids(container="bitsandbytes, gptq", bits="8", experts="quantize") == [("gptq", 8, 64)]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"container": "awq"}, "--container takes bitsandbytes"),
        ({"container": "gptq,", "bits": "4"}, "an empty item"),
        ({"block_size": "64,all"}, "takes whole numbers"),
        ({"container": "gptq", "block_size": "256,512"}, "no block size 512"),
        ({"experts": "keep,drop"}, "--experts takes"),
        ({"container": "gptq", "double_quant": True}, "--container gptq has no --quant-type or"),
        ({"container": "gptq", "quant_type": "fp4", "bits": "8"}, "--container gptq has no"),
    ],
)
def test_grids_that_there_are_not(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        grids(**changes)


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
        ("--train-text x.txt", "--train-text has no effect without", "--train-steps 100"),
        ("--learning-rate 0.1", "--learning-rate has no effect without", "--train-steps 100"),
        ("--seeds 3", "--seeds has no effect without", "--train-steps 100"),
        ("--train-steps 3 --train-text x --learning-rate 0", "numbers above 0", "2e-4,1e-3"),
        ("--train-steps 3 --train-text x --learning-rate 1e-3,nan", "numbers above 0", "2e-4"),
        ("--train-steps 3 --train-text x --learning-rate 1e-3,fast", "numbers above 0", "2e-4"),
        ("--train-steps 3 --train-text x --learning-rate 1e-3,", "an empty item", ""),
        ("--train-steps 3 --train-text x --seeds 0", "--seeds", ""),
        (f"--train-steps 3 --train-text x --seed {LARGEST_SEED}", "no 2 seeds", "--seed 0"),
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
    for bits in ("4", "4,2"):
        error = refused("compare", "-m", tiny, "--bits", bits, "--init", "loftq", "--ranks", "4,65")
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


def decide(*found: ComparedMethod, losses: Any = None, **training: Any) -> Any:
    how = None if losses is None else a_training(**training)
    return verdict(relative_to_qlora([ORIGINAL, *found]), losses or {}, how)


def a_training(**changes: Any) -> Training:
    given = {
        "learning_rates": [1e-3, 2e-3, 4e-3], "seeds": [0, 1],
        "optimizer": "adamw_torch_fused", "lr_scheduler": "linear", "weight_decay": 0.0,
        "max_grad_norm": 1.0, **changes,
    }  # fmt: skip
    return Training.model_validate(given)


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


def on_grid(
    grid: str, size: int, stored: float, kl: float | None, init: str = "qlora", **changes: Any
) -> ComparedMethod:
    about = {"grid": grid, "block_size": size, "stored_bits": stored, "container": "gptq"}
    return method(init, kl, int(grid[-1]), **{**about, **changes})


def test_kept_experts_against_their_bytes(tmp_path: Path, loftq: Loftq, other_text: Path) -> None:
    save("Mixtral", tmp_path / "model", vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_DIRECTORY / name, tmp_path / "model" / name)
    line = ("compare", "-m", tmp_path / "model", "--container", "compressed-tensors", "--json")
    done = loftq(
        *line, "--experts", "quantize,keep", "--init", "qlora", "--ranks", 4, "--text", other_text
    )
    assert done.code == 0, done.err
    results = json.loads(done.out)["results"]
    kept, quantized = results["verdict"]["grids"][::-1]
    assert (kept["experts"], quantized["experts"]) == ("keep", "quantize")
    assert kept["backbone_bytes"] > 1.2 * quantized["backbone_bytes"]
    assert quantized["least"]
    by_experts = {each["experts"]: each["kl_divergence"] for each in results["methods"][1:]}
    assert by_experts["keep"] < by_experts["quantize"]


def test_grids_against_their_bytes() -> None:
    """Each with its own QLoRA; of all together it is said which is nearest for its bytes."""
    found = relative_to_qlora([
        on_grid("nf4", 64, 4.5, 0.004, container="bitsandbytes"),
        on_grid("int4", 32, 4.5, 0.006), on_grid("int4", 32, 4.5, 0.003, "calibrated"),
        on_grid("int4", 64, 4.25, 0.005), on_grid("int4", 64, 4.25, 0.002, "loftq"),
        on_grid("int2", 64, 2.25, 0.1), on_grid("int2", 64, 2.25, None, "loftq"),
    ])  # fmt: skip
    gains = [each.kl_gain for each in found]
    assert gains[2] == pytest.approx(2)
    assert gains[4] == pytest.approx(2.5)
    told = verdict(found, {})
    assert [(each.bits, each.container, each.block_size, each.init) for each in told.bits] == [
        (4, "bitsandbytes", 64, "qlora"), (4, "gptq", 32, "calibrated"), (4, "gptq", 64, "loftq"),
        (2, "gptq", 64, "qlora"),
    ]  # fmt: skip
    assert told.bits[0].sentence.startswith("At nf4 in blocks of 64 (bitsandbytes) no gain here")
    assert told.bits[3].sentence.startswith("At 2 bits no gain here")
    assert [(each.grid, each.block_size, each.least) for each in told.grids] == [
        ("int2", 64, True), ("int4", 64, True), ("int4", 32, False), ("nf4", 64, False),
    ]  # fmt: skip
    least = told.grids[1]
    assert (least.data_free_init, least.data_free_kl, least.calibrated_kl) == ("loftq", 0.002, None)
    assert (told.grids[2].data_free_kl, told.grids[2].calibrated_kl) == (0.006, 0.003)
    assert told.sentence.endswith(
        "Nearest to the original for its bytes: int2 in blocks of 64 (gptq) with 2.25 stored bits "
        "(KL 0.1) and int4 in blocks of 64 (gptq) with 4.25 stored bits (KL 0.002). No nearer for "
        "as many bytes or more: int4 in blocks of 32 (gptq) with 4.5 stored bits and nf4 in blocks "
        "of 64 (bitsandbytes) with 4.5 stored bits."
    )


def test_grids_of_one_size_and_figures_that_are_none() -> None:
    assert verdict([on_grid("nf4", 64, 4.5, 0.1), on_grid("nf2", 64, 4.5, 0.2)], {}).grids == []
    told = verdict([on_grid("int4", 64, 4.25, None), on_grid("int2", 64, 2.25, None)], {})
    assert not any(each.least for each in told.grids)
    assert told.sentence.endswith("no KL divergence is a number.")


def test_grids_from_their_files(loftq: Loftq, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two integer containers the one that does not know the model's layers is left out."""
    import json

    monkeypatch.setattr(evaluation, "MOST_TOKENS", 256)
    done = loftq("compare", "-m", tiny, "--init", "loftq", "--bits", "4,2", "--container",
                 "bitsandbytes,gptq,compressed-tensors", "--block-size", "32,128", "--iterations",
                 1, "--ranks", 2, "--json")  # fmt: skip
    assert done.code == 0, done.err
    document = json.loads(done.out)
    results = document["results"]
    assert results["settings"]["containers"] == ["bitsandbytes", "gptq", "compressed-tensors"]
    assert results["settings"]["block_sizes"] == [32, 128]
    found = [
        (each["grid"], each["container"], each["block_size"]) for each in results["methods"][1::2]
    ]
    assert found == [
        ("nf4", "bitsandbytes", 32), ("int4", "gptq", 32),
        ("nf2", "bitsandbytes", 32), ("int2", "gptq", 32),
    ]  # fmt: skip
    assert "left out: int4 in blocks of 32 (compressed-tensors), for its model" in done.err
    assert "left out: nf4 in blocks of 128 (bitsandbytes), for its rows have 64 weights" in done.err
    stored = {each["grid"]: each["stored_bits"] for each in results["methods"][1:]}
    assert stored["int2"] < stored["int4"] < stored["nf4"] == stored["nf2"]
    assert [each["grid"] for each in results["verdict"]["grids"]][:2] == ["int2", "int4"]
    file = tiny.parent / "grids.json"
    file.write_text(done.out)
    shown = loftq("report", file, "--format", "table").out
    assert "KL by stored bits" in shown
    assert "nf4, int4, nf2, int2 in bitsandbytes, gptq, compressed-tensors" in shown


def ended(
    init: str, after: float, bits: int = 4, spread: float | None = 0.001, **changes: Any
) -> tuple[ComparedMethod, list[float]]:
    """A trained method, and its held-out windows, which differ alike in all of them."""
    found = method(
        init, 0.01, bits, learning_rate=2e-3, heldout_loss_after=after,
        heldout_loss_spread=spread, **changes,
    )  # fmt: skip
    return found, [after - 0.5, after, after + 0.5]


def judged(*trained: tuple[ComparedMethod, list[float]], **training: Any) -> Any:
    losses = {key(found): windows for found, windows in trained}
    return decide(*[found for found, _ in trained], losses=losses, **training)


def test_a_difference_beyond_the_spread() -> None:
    told = judged(ended("lora", 2.2, 16), ended("qlora", 2.5), ended("loftq", 2.4))
    four = told.bits[0]
    assert (four.trained_init, four.trained_rank, four.trained_gain) == ("loftq", 8, True)
    assert four.trained_learning_rate == 2e-3
    assert four.trained_margin == pytest.approx(0.1)
    # The seeds' alone: 0.001 · √(2 / 2).
    assert four.trained_margin_error == pytest.approx(0.001)
    assert four.trained_ties == []
    assert four.sentence.endswith(
        "Trained, loftq at rank 8 ends lowest, at 2.4000 with learning rate 0.002: 0.1000 ± 0.0010 "
        "below QLoRA (2.5000 with learning rate 0.002); 16-bit LoRA ends at 2.2000 with learning "
        "rate 0.002, 0.2000 below that."
    )
    assert told.sentence.endswith("below that."), "nothing to reserve"


def test_a_difference_of_less_than_twice_the_error_is_none() -> None:
    told = judged(
        ended("lora", 2.401, 16), ended("qlora", 2.404, spread=0.004), ended("loftq", 2.4)
    )
    four = told.bits[0]
    assert four.trained_gain is False
    assert "Trained, no difference to QLoRA (2.4040 with learning rate 0.002): " in four.sentence
    assert "loftq at rank 8 ends lowest, at 2.4000" in four.sentence
    assert "; 16-bit LoRA ends at 2.4010 with learning rate 0.002, no difference to that." in (
        four.sentence
    )


def test_a_difference_that_other_windows_could_undo_is_none() -> None:
    qlora, loftq = ended("qlora", 2.5), ended("loftq", 2.4)
    loftq[1][:] = [2.0, 2.3, 2.9]  # 0.3 and 0.2 below, and 0.2 above
    four = judged(qlora, loftq).bits[0]
    assert four.trained_gain is False
    assert four.trained_margin == pytest.approx(0.1)
    windows = difference(qlora[1], loftq[1])[1]
    assert windows is not None
    assert four.trained_margin_error == pytest.approx(math.hypot(windows, 0.001))


def test_starts_that_are_as_good_as_the_best_are_named() -> None:
    told = judged(
        ended("qlora", 2.5), ended("loftq-plain", 2.45), ended("loftq", 2.4), ended("pissa", 2.4001)
    )
    assert told.bits[0].trained_ties == ["pissa"]
    assert "; no difference to pissa at rank 8." in told.sentence


def test_where_the_starts_were_on_the_way() -> None:
    told = judged(
        ended("qlora", 2.5, heldout_loss_before=3.2, heldout_loss_quarter=2.8),
        ended("loftq", 2.4, heldout_loss_before=3.1, heldout_loss_quarter=2.9),
    )
    assert (
        "; before training loftq at rank 8 was lowest (3.1000), at a quarter of the steps QLoRA at "
        "rank 8 was lowest (2.8000)."
    ) in told.sentence


def test_qlora_ends_lowest() -> None:
    four = judged(ended("qlora", 2.4), ended("loftq", 2.5)).bits[0]
    assert (four.trained_init, four.trained_gain, four.trained_margin) == ("qlora", False, None)
    assert four.sentence.endswith(
        "Trained, no gain here: no start ends below QLoRA (2.4000 with learning rate 0.002)."
    )


def test_training_that_diverged() -> None:
    qlora = method("qlora", 0.01)
    loftq, windows = ended("loftq", 2.1)
    told = decide(qlora, loftq, losses={key(loftq): windows})
    assert "nothing can be said: the training of QLoRA diverged" in told.sentence
    assert told.bits[0].trained_gain is None
    told = decide(qlora, losses={})
    assert "the training of QLoRA diverged" in told.sentence


def test_what_limits_a_verdict_is_said() -> None:
    few = {"learning_rates": [1e-3], "seeds": [3]}
    told = judged(ended("qlora", 2.5, spread=None), ended("loftq", 2.4, spread=None), **few)
    assert told.sentence.endswith(
        "One learning rate for all: at its own best a start may end elsewhere. One seed: what "
        "others would give is not known."
    )
    told = judged(ended("qlora", 2.5, rate_at_end="highest"), ended("loftq", 2.4))
    assert told.sentence.endswith(
        "Best at the highest learning rate that was tried, so that others may be better: QLoRA (4 "
        "bits, rank 8) (--learning-rate 0.004,0.008,0.016)."
    )
    ends = [ended(init, 2.5, rate_at_end="lowest") for init in ("qlora", "loftq")]
    assert judged(*ends).sentence.endswith(
        "so that others may be better: every start (--learning-rate 0.00025,0.0005,0.001)."
    )
    single = decide(
        ended("qlora", 2.5, spread=None)[0], ended("loftq", 2.4, spread=None)[0],
        losses={key(method(init, 0.01)): [loss] for init, loss in (("qlora", 2.5), ("loftq", 2.4))},
        seeds=[0],
    )  # fmt: skip
    assert single.bits[0].trained_gain is False, "one window and one seed have no spread"
    assert single.bits[0].trained_margin_error is None


def test_the_standard_error_of_paired_differences() -> None:
    mean, error = difference([3.0, 5.0, 8.0], [2.0, 3.0, 5.0])
    assert mean == pytest.approx(2)
    assert error == pytest.approx(1 / math.sqrt(3))
    assert difference([2.0], [1.0]) == (1.0, None)


def test_a_grid_that_could_not_be_loaded_is_left_out(
    loftq: Loftq, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first method is made, and the others are compared."""
    import json
    import shutil

    from tests.experts import save

    monkeypatch.setattr(evaluation, "MOST_TOKENS", 256)
    vocabulary = json.loads((tiny / "config.json").read_text())["vocab_size"]
    kept = {}
    for name in ("Llama 4", "gpt-oss"):
        directory = tmp_path / name
        save(name, directory, vocab_size=vocabulary)
        for file in tiny.glob("tokenizer*"):
            shutil.copy(file, directory)
        done = loftq("compare", "-m", directory, "--init", "qlora", "--experts", "quantize,keep",
                     "--ranks", 2, "--json")  # fmt: skip
        assert done.code == 0, done.err
        methods = json.loads(done.out)["results"]["methods"][1:]
        (kept[name],) = {each["experts"] for each in methods}
        assert "left out: nf4 in blocks of 64 (bitsandbytes" in done.err
    # transformers makes quantized layers of the one's experts, and none of the other's.
    assert kept == {"Llama 4": "quantize", "gpt-oss": "keep"}


def test_a_container_that_takes_experts_only_as_they_are(
    loftq: Loftq, refused: Refused, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json
    import shutil

    from tests.experts import save

    monkeypatch.setattr(evaluation, "MOST_TOKENS", 256)
    vocabulary = json.loads((tiny / "config.json").read_text())["vocab_size"]
    save("Mixtral", tmp_path, vocab_size=vocabulary)
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    line = "compare", "-m", tmp_path, "--init", "qlora", "--experts", "quantize,keep", "--json"
    done = loftq(*line, "--container", "gptq", "--ranks", 2)
    assert done.code == 0, done.err
    assert [each["experts"] for each in json.loads(done.out)["results"]["methods"][1:]] == ["keep"]
    assert "left out: int4 in blocks of 64 (gptq), for gptqmodel looks for gate_proj" in done.err
    assert "hint: --ranks " in refused(*line, "--container", "gptq", "--ranks", 5000)
