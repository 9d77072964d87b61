"""`loftq compare --tasks`: lm-eval's own figures, before and after training, and what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.commands import compare_run
from loftq_cli.commands.compare_plan import TrainingPlan
from loftq_cli.commands.compare_train import Trainee, Trials
from loftq_cli.models import evaluation
from loftq_cli.report.task_verdict import with_tasks
from loftq_cli.schema import ComparedMethod, CompareVerdict, TaskScore
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]
Refused = Callable[..., str]
NEXT_WORD = Path(__file__).parents[2] / "examples" / "tasks" / "next_word.yaml"
FORM = ("--bits", 2, "--dtype", "float32", "--seed", 1)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(evaluation, "MOST_TOKENS", 512)


# --- by lm-eval ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def next_word(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task that is among the examples, with fewer questions."""
    pytest.importorskip("lm_eval")
    return copied(tmp_path_factory.mktemp("task"), questions=40)


def copied(into: Path, questions: int, name: str = "next_word") -> Path:
    for suffix in (".yaml", ".py"):
        text = NEXT_WORD.with_suffix(suffix).read_text()
        (into / f"{name}{suffix}").write_text(text.replace("next_word", name))
    lines = NEXT_WORD.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    (into / f"{name}.jsonl").write_text("".join(lines[:questions]))
    return into / f"{name}.yaml"


@pytest.fixture(scope="module")
def compared(
    loftq: Loftq, tiny: Path, next_word: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A comparison with two learning rates, of which the higher is better, and tried first."""
    folder = tmp_path_factory.mktemp("texts")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for name, count in (("train", 200), ("heldout", 60)):
        (folder / name).write_text(" ".join(words * count))
        words = words[1:]
    done = loftq(
        "compare", "-m", tiny, "--init", "loftq", "--ranks", 4, "--tasks", next_word, *FORM,
        "--text", folder / "heldout", "--train-steps", 6, "--train-text", folder / "train",
        "--learning-rate", "1e-5,2e-2", "--seeds", 1, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    document: dict[str, Any] = json.loads(done.out)
    return document


def test_the_figures_are_those_that_lm_eval_gives_by_hand(
    compared: dict[str, Any], loftq: Loftq, tiny: Path, next_word: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = loftq("quantize", "-m", tiny, "-o", out, "--init", "loftq", "--rank", 4, *FORM)
    assert done.code == 0, done.err
    arguments = f"pretrained={out},peft={out}/loftq_init,dtype=float32"
    asked = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks",
         next_word, "--output_path", tmp_path / "results", "--device", "cpu"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    (file,) = (tmp_path / "results").rglob("*.json")
    by_hand = json.loads(file.read_text())["results"]["next_word"]
    methods = compared["results"]["methods"]
    (found,) = (each["scores"] for each in methods if each["init"] == "loftq")
    accuracy, brier = found
    assert accuracy == {
        "task": "next_word",
        "metric": "acc",
        "filter": None,
        "value": by_hand["acc,none"],
        "standard_error": by_hand["acc_stderr,none"],
        "higher_is_better": True,
    }
    assert brier["value"] == pytest.approx(by_hand["brier_score,none"], rel=1e-6)
    assert (brier["standard_error"], brier["higher_is_better"]) == (None, False)
    (other,) = (each["scores"] for each in methods if each["init"] == "qlora")
    assert abs(other[1]["value"] - brier["value"]) > 1e-4, (
        "starts differ, so that it says something"
    )


def test_scores_before_and_after_training(compared: dict[str, Any]) -> None:
    results = compared["results"]
    assert results["settings"]["tasks"] == [
        {"name": "next_word", "version": "1.0", "shots": 0, "questions": 40}
    ]
    original, *rest = results["methods"]
    assert len(original["scores"]) == 2
    assert original["trained_scores"] == []
    for each in rest:
        before, after = (each[key][1]["value"] for key in ("scores", "trained_scores"))
        # At the other rate, which was tried last, nothing moves.
        assert each["learning_rate"] == 2e-2
        assert abs(before - after) > 1e-3
    told = results["verdict"]
    assert [(each["task"], each["trained"]) for each in told["tasks"]] == [
        ("next_word", False), ("next_word", True),
    ]  # fmt: skip
    assert all(each["sentence"] in told["sentence"] for each in told["tasks"])
    assert compared["timings_seconds"]["tasks"] > 0
    assert "lm-eval" in compared["environment"]["packages"]


@pytest.fixture
def few_tasks(next_word: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose tasks lm-eval has instead of its own, which take long to index."""
    from lm_eval.tasks import TaskManager

    class Few(TaskManager):  # type: ignore[misc]
        def __init__(self, include_defaults: bool) -> None:
            super().__init__(include_path=tmp_path if include_defaults else None,
                             include_defaults=False)  # fmt: skip

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Few)
    copied(tmp_path, questions=3)
    return tmp_path


def test_a_group_is_its_own_score_or_its_tasks(few_tasks: Path) -> None:
    from loftq_cli.models.downstream import Downstream

    task = (few_tasks / "next_word.yaml").read_text()
    lines = [f"    {each}" for each in task.splitlines() if each[0] != "#"]
    task = "  - " + "\n".join(lines).strip()
    members = "".join(task.replace("task: next_word", f"task: {name}") + "\n" for name in "ab")
    (few_tasks / "plain.yaml").write_text(f"group: plain\ntask:\n{members}")
    summed = "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    (few_tasks / "summed.yaml").write_text(f"group: summed\n{summed}task:\n{members}")
    asked = Downstream(["plain", "summed"])
    assert [(each.name, each.questions, each.shots) for each in asked.tasks] == [
        ("plain::a", 3, 0), ("plain::b", 3, 0), ("summed", 6, 0),
    ]  # fmt: skip


def test_what_is_no_task_is_said_before_anything_is_quantized(
    refused: Refused, few_tasks: Path, next_word: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_run, "Bench", None)
    said = refused("compare", "--tasks", "nextword", code=2)
    assert "lm-eval has no task called 'nextword'" in said
    assert "cause: the nearest that it has: next_word" in said
    missing = few_tasks / "none.yaml"
    assert f"there is no file {missing}" in refused("compare", "--tasks", missing, code=2)
    broken = few_tasks / "broken.yaml"
    for text in ("task: [", "output_type: multiple_choice", "- 1", "task: x\ntest_split: test\n"):
        broken.write_text(text)
        said = refused("compare", "--tasks", broken)
        assert f"the task {broken} cannot be loaded" in said
        assert "cause: " in said
    said = refused("compare", "--tasks", f"{next_word},next_word", code=2)
    assert "--tasks has the task next_word twice" in said


# --- without it ---------------------------------------------------------------------------------


def test_without_lm_eval(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    said = refused("compare", "--tasks", "arc_easy", code=2)
    assert "error: --tasks needs lm-eval" in said
    assert "hint: pip install 'loftq[eval]'" in said


def test_a_search_leaves_the_adapter_of_its_best_rate(tiny: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    trainee = Trainee(
        get_peft_model(model, settings),
        torch.arange(16).repeat(16, 2),
        torch.arange(16).repeat(2, 2),
    )
    before = evaluation.evaluate(trainee.model, torch.arange(16).repeat(2, 2))
    plan = TrainingPlan(steps=4, rates=(1e-6, 1e-2), seeds=(0,))
    contest = Trials(plan).search(trainee, before, lambda doing: None)
    assert list(contest.search.tried) == [1, 0], "the best comes first"
    assert contest.rate == 1e-2
    after = evaluation.evaluate(trainee.model, torch.arange(16).repeat(2, 2))
    assert after.loss == pytest.approx(contest.seeds[0].runs[1e-2].after.loss, rel=1e-6)
    assert after.loss < before.loss - 0.01


def method(init: str, value: float | None, error: float | None, **changes: Any) -> ComparedMethod:
    score = TaskScore(
        task="t", metric="acc", filter=changes.pop("filter", None), value=value,
        standard_error=error, higher_is_better=changes.pop("higher_is_better", True),
    )  # fmt: skip
    fields: dict[str, Any] = {
        "bits": 2, "stored_bits": 4.5, "grid": "nf2", "container": "bitsandbytes",
        "block_size": 64, "rank": None if init == "original" else 8, "weight_error_relative": 0.1,
        "kl_divergence": 0.1, "perplexity": 2.0, "backbone_bytes": 1, "adapter_bytes": 1,
        "trainable_parameters": 1, "seconds": 1.0,
    }  # fmt: skip
    return ComparedMethod(init=init, **fields, **{"scores": [score], **changes})


BETTER = "loftq at rank 8 is best: {}; QLoRA has {}"


@pytest.mark.parametrize(
    ("qlora", "loftq", "higher_is_better", "sentence", "gain"),
    [
        ((0.5, 0.03), (0.7, 0.03), True, BETTER.format("0.700 ± 0.030", "0.500 ± 0.030"), True),
        ((0.5, 0.03), (0.58, 0.03), True,
         BETTER.format("0.580 ± 0.030", "0.500 ± 0.030, which is within the error"), False),
        ((0.5, 0.03), (0.5, 0.03), True, "no start is better than QLoRA: 0.500 ± 0.030", False),
        ((0.0, 0.0), (None, None), True, "no start is better than QLoRA: 0.000 ± 0.000", False),
        ((40.0, None), (30.0, None), False, BETTER.format("30", "40"), None),
    ],
)  # fmt: skip
def test_what_scores_say(
    qlora: Any, loftq: Any, higher_is_better: bool, sentence: str, gain: bool | None
) -> None:
    methods = [
        method(init, *figures, higher_is_better=higher_is_better)
        for init, figures in (("original", (0.8, 0.02)), ("qlora", qlora), ("loftq", loftq))
    ]
    told = with_tasks(CompareVerdict(sentence="All.", bits=[]), methods)
    ends = "The original has 0.800 ± 0.020."
    assert told.sentence == f"All. On t (acc), at 2 bits, {sentence}. {ends}"
    (found,) = told.tasks
    assert (found.gain, found.trained) == (gain, False)


def test_what_scores_after_training_say() -> None:
    methods = [method("original", 0.8, 0.02)]
    for name, value in (("qlora", 0.5), ("loftq", 0.9)):
        after = method(name, value, 0.01, filter="strict").scores
        methods.append(method(name, 0.4, 0.02, filter="strict", trained_scores=after))
    first, second = with_tasks(CompareVerdict(sentence="", bits=[]), methods).tasks
    assert first.init == "qlora"
    assert second.sentence == (
        "On t (acc, strict), at 2 bits and trained, loftq at rank 8 is best: 0.900 ± 0.010; QLoRA "
        "has 0.500 ± 0.010."
    )
    assert second.margin == pytest.approx(0.4)
    assert second.gain is True


def test_nothing_is_said_without_scores() -> None:
    methods = [method(name, None, None, scores=[]) for name in ("original", "qlora")]
    assert with_tasks(CompareVerdict(sentence="All.", bits=[]), methods).sentence == "All."
    undirected = [method(n, 1.0, None, higher_is_better=None) for n in ("original", "qlora")]
    assert with_tasks(CompareVerdict(sentence="All.", bits=[]), undirected).tasks == []
