"""A short fine-tune: the adapter alone, the same data for every start, and the loss falls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from loftq_cli.models.adapters import attach_fresh
from loftq_cli.models.evaluation import evaluate
from loftq_cli.models.finetuning import BATCH, Schedule, TrainingDiverged, finetune

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
    assert found.before.loss == pytest.approx(start.loss, rel=1e-3 if bits == 4 else 1e-6)
    assert found.after.loss < found.before.loss - 0.05
    assert steps == [1, 2, 3, 4, 5, 6]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != ("lora_" in name), name
    assert found.after.loss == evaluate(model, windows(2)).loss, "the model is left as it ended"


def test_the_curve(source: Path) -> None:
    found = finetune(adapted(source), windows(1), windows(2), TRAINING)
    assert [point.step for point in found.curve] == [1, 2, 3, 4, 5, 6]
    assert all(point.train_loss is not None for point in found.curve)
    looked = [point.step for point in found.curve if point.heldout_loss is not None]
    assert looked == [3, 6]
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
    with pytest.raises(TrainingDiverged, match="diverged") as caught:
        finetune(adapted(source), windows(1), windows(2), Schedule(3, 1e30, 0))
    assert caught.value.hint == "--learning-rate 2.5e+29"


def test_a_model_that_predicts_no_number(source: Path) -> None:
    model = adapted(source)
    model.get_input_embeddings().weight.data[:] = torch.nan
    with pytest.raises(TrainingDiverged, match="nothing to train"):
        finetune(model, windows(1), windows(2), TRAINING)


def test_a_single_step_is_a_step(source: Path) -> None:
    """The Trainer's first step of a warmup has a rate of zero."""
    trained = finetune(adapted(source), windows(1), windows(2), Schedule(1, 0.02, 0))
    assert trained.after.loss != trained.before.loss


def test_nothing_is_printed_or_left_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    finetune(adapted(source), windows(1), windows(2), Schedule(2, 0.02, 0))
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
