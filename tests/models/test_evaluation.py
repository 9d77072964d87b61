"""KL divergence and perplexity: against float64, and against transformers' own loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from loftq_cli.errors import CorruptCheckpoint, InvalidSetting, UnsupportedModel
from loftq_cli.models import evaluation
from loftq_cli.models.architecture import Architecture
from loftq_cli.models.evaluation import Reference, evaluate, require_causal
from loftq_cli.models.loading import LoadedModel
from loftq_cli.models.texts import text_windows


def gpt2(seed: int, vocabulary: int = 61) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=1,
        n_head=2,
        n_embd=16,
        n_positions=32,
        vocab_size=vocabulary,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(61, (21, 12), generator=torch.Generator().manual_seed(3))


def slow(original: Any, model: Any, windows: torch.Tensor) -> tuple[float, list[float]]:
    """KL and the loss of every window, one token at a time, in float64."""
    divergences, losses = [], []
    for window in windows:
        with torch.no_grad():
            p, q = (each(window[None]).logits[0].double() for each in (original, model))
        loss = []
        for place in range(len(window) - 1):
            one, two = p[place].softmax(0), q[place].softmax(0)
            divergences.append(float((one * (one.log() - two.log())).sum()))
            loss.append(-math.log(two[window[place + 1]]))
        losses.append(math.fsum(loss) / len(loss))
    return math.fsum(divergences) / len(divergences), losses


@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("at_once", [61, 1 << 24])
def test_against_float64(
    windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch, kept: int, at_once: int
) -> None:
    monkeypatch.setattr(evaluation, "KEPT_BYTES", kept)
    monkeypatch.setattr(evaluation, "_LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(evaluation, "_LOGITS", 61 * 12 * 5)
    original, model = gpt2(0), gpt2(1)
    divergence, losses = slow(original, model, windows)
    reference = Reference(original, windows)
    for _ in range(2):  # the second time from what is kept
        found = evaluate(model, windows, reference)
        assert found.kl_divergence == pytest.approx(divergence, rel=1e-5)
        assert found.window_losses == pytest.approx(losses, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 21), rel=1e-5)


def test_against_the_loss_of_transformers(windows: torch.Tensor) -> None:
    model = gpt2(1)
    with torch.no_grad():
        loss = float(model(input_ids=windows, labels=windows).loss)
    found = evaluate(model, windows)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.kl_divergence is None


def test_a_model_is_no_distance_from_itself(windows: torch.Tensor) -> None:
    model = gpt2(1)
    assert evaluate(model, windows, Reference(model, windows)).kl_divergence == 0
    assert evaluate(gpt2(1), windows, Reference(model, windows)).kl_divergence == pytest.approx(
        0, abs=1e-9
    )


def test_tokens_that_both_rule_out_cost_nothing(windows: torch.Tensor) -> None:
    original, model = gpt2(0), gpt2(1)
    windows = windows.clamp(max=59)
    plain = evaluate(model, windows, Reference(original, windows))
    for each in (original, model):
        each.lm_head.register_forward_hook(
            lambda *arguments: torch.cat(
                [arguments[-1][..., :60], torch.full_like(arguments[-1][..., :1], -torch.inf)], -1
            )
        )
    found = evaluate(model, windows, Reference(original, windows))
    assert found.kl_divergence is not None
    assert plain.kl_divergence is not None
    assert math.isfinite(found.kl_divergence)
    assert found.kl_divergence != plain.kl_divergence


def test_the_mode_is_left_as_it_is_and_gradients_flow_on(windows: torch.Tensor) -> None:
    model = gpt2(1).train()
    evaluate(model, windows)
    assert model.training
    model(input_ids=windows, labels=windows).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_other_tokens_are_refused(windows: torch.Tensor) -> None:
    with pytest.raises(UnsupportedModel, match="same tokens"):
        evaluate(gpt2(1, vocabulary=67), windows, Reference(gpt2(0), windows))


class Letters:
    """A tokenizer of one token a letter."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos
        self.begins = bos is not None

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        ids = [ord(letter) - ord("a") for letter in text]
        first = [self.bos_token_id] if add_special_tokens and self.begins else []
        return {"input_ids": [*first, *ids]}


def test_windows_begin_as_the_tokenizer_begins_texts() -> None:
    loaded = LoadedModel(gpt2(0), Letters(), None)
    assert text_windows(loaded, "ab" * 40, "x").tolist() == [[0, 1] * 16] * 2
    loaded = LoadedModel(gpt2(0), Letters(bos=7), None)
    found = text_windows(loaded, "ab" * 40, "x")
    assert found.shape == (2, 32)
    assert found[:, 0].tolist() == [7, 7]
    assert found[:, 1:].flatten().tolist() == [0, 1] * 31
    assert len(text_windows(loaded, "ab" * 400, "x", limit=64)) == 2


def test_a_text_that_fills_no_window() -> None:
    with pytest.raises(InvalidSetting, match="hello is too short"):
        text_windows(LoadedModel(gpt2(0), Letters(), None), "abc", "hello")
    with pytest.raises(UnsupportedModel, match="no tokenizer"):
        text_windows(LoadedModel(gpt2(0), None, None), "abc", "hello")


def test_the_tokenizer_of_another_model() -> None:
    loaded = LoadedModel(gpt2(0, vocabulary=3), Letters(), None)
    assert text_windows(loaded, "abc" * 20, "x").max() == 2
    with pytest.raises(CorruptCheckpoint, match="the tokenizer is not this model's") as caught:
        text_windows(loaded, "abd" * 20, "x")
    assert caught.value.cause == "it has a token 3, and the model's embedding 3 rows"


def test_only_causal_models() -> None:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    t5 = T5ForConditionalGeneration(T5Config(**sizes))
    with pytest.raises(UnsupportedModel, match="encoder-decoder") as caught:
        require_causal(Architecture(t5))
    assert caught.value.hint
    bert = BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(UnsupportedModel, match="BertModel does not predict") as caught:
        require_causal(Architecture(bert))
    assert caught.value.hint
    require_causal(Architecture(gpt2(0)))


def test_a_loss_beyond_floats_has_an_infinite_perplexity() -> None:
    assert evaluation.Evaluation((1e4,), None).perplexity == math.inf
