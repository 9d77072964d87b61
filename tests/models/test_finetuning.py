"""A short fine-tune: the adapter alone, the same data for every start, and the loss falls."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from loftq_cli.models.adapters import attach_fresh
from loftq_cli.models.evaluation import Evaluation, evaluate
from loftq_cli.models.finetuning import BATCH, Schedule, finetune, training_arguments

TRAINING = Schedule(steps=6, learning_rate=0.02, seed=5)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with dropout, which training must switch off."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=64, n_positions=16, vocab_size=31, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("tiny")
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def adapted(source: Path, *, bits: int = 16) -> Any:
    settings = {}
    if bits == 4:
        settings = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    torch.manual_seed(1)
    model = GPT2LMHeadModel.from_pretrained(source, **settings)
    return attach_fresh(model, 4, "CAUSAL_LM").eval()


def windows(seed: int, count: int = 20) -> torch.Tensor:
    """A language to be learnt: every token is followed by the next one."""
    starts = torch.randint(31, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + torch.arange(8)) % 31


def watched(model: Any) -> list[torch.Tensor]:
    """What the model is given while it trains."""
    seen: list[torch.Tensor] = []

    def look(module: Any, arguments: Any) -> None:
        if torch.is_grad_enabled():
            seen.append(arguments[0].clone())

    # PEFT 0.18 calls the forward method of the whole model, past its hooks.
    model.get_input_embeddings().register_forward_pre_hook(look)
    return seen


@pytest.mark.parametrize("bits", [16, 4])
def test_only_the_adapter_is_trained_and_the_loss_falls(source: Path, bits: int) -> None:
    model = adapted(source, bits=bits)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = evaluate(adapted(source, bits=bits).train(False), windows(2))
    steps: list[int] = []
    found = finetune(model, windows(1), windows(2), TRAINING, steps.append)
    assert found.after is not None
    assert found.after.loss < found.quarter.loss < start.loss
    assert steps == [1, 2, 3, 4, 5, 6]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != ("lora_" in name), name
    assert found.after.loss == evaluate(model, windows(2)).loss, "the model is left as it ended"


def test_the_curve(source: Path) -> None:
    found = finetune(adapted(source), windows(1), windows(2), TRAINING)
    assert [point.step for point in found.curve] == [1, 2, 3, 4, 5, 6]
    assert all(point.train_loss is not None for point in found.curve)
    looked = [point.step for point in found.curve if point.heldout_loss is not None]
    assert looked == [2, 6], "at a quarter and at the end"
    assert found.after is not None
    assert found.curve[1].heldout_loss == found.quarter.loss
    assert found.curve[-1].heldout_loss == found.after.loss
    # Without dropout, the first step's loss is that of its eight windows as the model stands.
    seen = watched(model := adapted(source))
    again = finetune(model, windows(1), windows(2), TRAINING)
    assert again.curve == found.curve, "the same seed, the same curve"
    first = evaluate(adapted(source), seen[0]).loss
    assert found.curve[0].train_loss == pytest.approx(first, rel=1e-4)


def test_every_start_sees_the_same_windows_in_the_same_order(source: Path) -> None:
    orders = []
    for bits, steps in ((16, 6), (4, 6), (16, 3)):
        model = adapted(source, bits=bits)
        seen = watched(model)
        torch.rand(bits)  # whatever happened before
        finetune(model, windows(1), windows(2), Schedule(steps, 0.02, 5))
        orders.append(torch.cat(seen))
    assert torch.equal(orders[0], orders[1])
    assert orders[0][:BATCH].shape == (BATCH, 8)
    # 20 windows are seen once before any is seen again.
    assert torch.equal(orders[0][:20].sort(0).values, windows(1).sort(0).values)
    assert torch.equal(orders[0][:20], orders[2][:20])
    other = adapted(source)
    seen = watched(other)
    finetune(other, windows(1), windows(2), Schedule(3, 0.02, 6))
    assert not torch.equal(torch.cat(seen), orders[2])


def test_a_learning_rate_that_is_far_too_large(source: Path) -> None:
    found = finetune(adapted(source), windows(1), windows(2), Schedule(3, 1e30, 0))
    assert found.after is not None
    assert not math.isfinite(found.after.loss)
    assert found.curve[-1].heldout_loss is None, "documents have no NaN"


def test_a_run_is_given_up_at_a_quarter(source: Path) -> None:
    asked: list[Evaluation] = []

    def goes_on(quarter: Evaluation) -> bool:
        asked.append(quarter)
        return False

    model = adapted(source)
    found = finetune(model, windows(1), windows(2), TRAINING, goes_on=goes_on)
    assert found.after is None
    assert [point.step for point in found.curve] == [1, 2]
    assert asked == [found.quarter] == [evaluate(model, windows(2))]
    whole = finetune(adapted(source), windows(1), windows(2), TRAINING)
    assert whole.quarter == found.quarter, "the schedule is that of all the steps"


def test_the_quarter_of_few_steps(source: Path) -> None:
    assert [Schedule(steps, 1, 0).quarter for steps in (1, 2, 4, 5, 200)] == [1, 1, 1, 2, 50]
    found = finetune(
        adapted(source), windows(1), windows(2), Schedule(1, 0.02, 0), goes_on=lambda quarter: False
    )
    assert found.after == found.quarter, "one step is a run already"
    start = evaluate(adapted(source), windows(2))
    assert found.quarter.loss != start.loss


def test_the_schedule_is_that_of_a_trainer_that_was_told_nothing(tmp_path: Path) -> None:
    ours = training_arguments(TRAINING, str(tmp_path), on_cpu=True)
    usual = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for name in (
        "per_device_train_batch_size", "lr_scheduler_type", "warmup_steps", "optim",
        "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
        "gradient_accumulation_steps", "label_smoothing_factor",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(usual, name), name


def test_nothing_is_printed_or_left_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    finetune(adapted(source), windows(1), windows(2), Schedule(2, 0.02, 0))
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
