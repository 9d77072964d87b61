"""No rate that a person reads holds what happens only once. The clock is a fake; nothing is timed.

Whatever is measured here takes a hundred seconds the first time, and one second from then on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from transformers import GPT2LMHeadModel

from loftq_cli.checks import kernels, model, rates
from loftq_cli.models import finetuning, generation
from loftq_cli.models.adapters import attach_fresh
from loftq_cli.models.spec import DEMO_DIRECTORY
from tests.conftest import Outcome

Monkey = pytest.MonkeyPatch


class Clock:
    """Stands in for the `time` module, and stands still by itself."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def slow_at_first(self, work: Callable[..., Any]) -> Callable[..., Any]:
        costs = self._costs()

        def timed(*arguments: Any, **options: Any) -> Any:
            self.now += next(costs)
            return work(*arguments, **options)

        return timed

    @staticmethod
    def _costs() -> Iterator[float]:
        yield 100.0
        while True:
            yield 1.0


@pytest.fixture
def clock(monkeypatch: Monkey) -> Clock:
    fake = Clock()
    for module in (rates, generation, finetuning):
        monkeypatch.setattr(module, "time", fake)
    return fake


@pytest.fixture
def slow_generate(clock: Clock, monkeypatch: Monkey) -> None:
    slow = clock.slow_at_first(transformers.GenerationMixin.generate)
    # A function and not a method, so that it is bound.
    monkeypatch.setattr(
        transformers.GenerationMixin, "generate", lambda self, **options: slow(self, **options)
    )


@pytest.mark.usefixtures("slow_generate")
@pytest.mark.parametrize("prompts", [["def f("], ["def f(", "import", "class"]])
def test_generate(prompts: list[str], loftq: Callable[..., Outcome]) -> None:
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    done = loftq("generate", *asked, "--max-new-tokens", 3, "--json")
    assert done.code == 0, done.err
    results = json.loads(done.out)["results"]
    assert [each["tokens_per_second"] for each in results["generations"]] == [3.0] * len(prompts)
    assert results["average_tokens_per_second"] == 3.0
    assert results["average_seconds"] == 1.0


@pytest.mark.usefixtures("clock")
def test_both_rates_of_check(clock: Clock, monkeypatch: Monkey) -> None:
    """The model with an adapter is another one: its first text is slow too."""
    honest, slow = transformers.GenerationMixin.generate, {}

    def generate(self: Any, **options: Any) -> Any:
        adapted = any("lora_A" in name for name, _ in self.named_modules())
        return slow.setdefault(adapted, clock.slow_at_first(honest))(self, **options)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    subject = model.Subject(DEMO_DIRECTORY, "cpu", "float32", False)
    model.load(subject)
    figures = model.generation(subject).figures
    assert len(slow) == 2
    assert figures["tokens_per_second"] == figures["tokens_per_second_with_adapter"] == 24.0


def test_products_copies_and_decompositions(clock: Clock, monkeypatch: Monkey) -> None:
    multiply = torch.Tensor.__matmul__
    slow: dict[Any, Callable[..., Any]] = {}

    def matmul(a: Any, b: Any) -> Any:
        return slow.setdefault((a.dtype, len(a)), clock.slow_at_first(multiply))(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    monkeypatch.setattr(rates, "_TRIAL_SIDE", 8)
    figures = rates.matrix_products("cpu").figures
    assert figures["flops_per_second_float32"] == 2 * 8**3
    assert figures["flops_per_second_bfloat16"] == 2 * 8**3

    monkeypatch.setattr(rates, "_COPY_BYTES", 1 << 20)
    slow_copy = clock.slow_at_first(torch.Tensor.copy_)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: slow_copy(self, other))
    assert rates.memory_bandwidth("cpu").figures["bytes_per_second"] == 2 << 20


def test_dequantization(clock: Clock, monkeypatch: Monkey) -> None:
    monkeypatch.setattr(kernels, "formats", list)
    slow = clock.slow_at_first(bnb.functional.dequantize_4bit)
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", slow)
    figures = kernels.dequantization("cpu").figures
    assert figures["output_bytes_per_second"] == 2 * 2048**2


def test_training(clock: Clock, monkeypatch: Monkey) -> None:
    """The held-out text was read before, as `compare` does, and is twice on the way."""
    monkeypatch.setattr(finetuning, "evaluate", clock.slow_at_first(finetuning.evaluate))
    config = transformers.GPT2Config(
        n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=9, bos_token_id=0, eos_token_id=0
    )
    adapted = attach_fresh(GPT2LMHeadModel(config), 2, "CAUSAL_LM")
    windows = torch.arange(32).remainder(9).view(4, 8)
    finetuning.evaluate(adapted, windows)
    trained = finetuning.finetune(adapted, windows, windows, finetuning.Schedule(2, 1e-3, 0))
    assert trained.seconds == 2.0


def test_loading(monkeypatch: Monkey) -> None:
    """A GPU that is set up belongs to the imports, as `load` gives a rate of reading."""
    from contextlib import contextmanager

    from loftq_cli.models import loading

    steps: list[str] = []
    made: list[str] = []

    @contextmanager
    def clock(step: str) -> Iterator[None]:
        steps.append(step)
        yield

    honest = torch.empty

    def empty(*shape: Any, **options: Any) -> torch.Tensor:
        made.append(steps[-1])
        return honest(*shape, **options)

    monkeypatch.setattr(torch, "empty", empty)
    loading.load_model(Path(DEMO_DIRECTORY), device="cpu", dtype="float32", clock=clock)
    assert made[0] == "import"
