"""Work on a GPU, and what happens where there is too little room on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loftq_cli.core.blockwise import BlockwiseFormat, dequantize_blockwise, quantize_blockwise
from loftq_cli.engines import tasks
from loftq_cli.engines.placement import with_fallback
from tests.conftest import Outcome


def test_a_layer_without_room_is_computed_on_the_cpu() -> None:
    """A stand-in for a weight on a GPU, which this test cannot have."""
    there: Any = SimpleNamespace(device=torch.device("cuda:0"), cpu=lambda: "here")
    tried: list[Any] = []

    def work(W: Any) -> str:
        tried.append(W)
        if W is there:
            raise torch.OutOfMemoryError("no room")
        return "done"

    told: list[None] = []
    assert with_fallback(work, there, "cuda:0", lambda: told.append(None)) == "done"
    assert tried == [there, "here"]
    assert len(told) == 1


def test_a_weight_that_did_not_get_there_is_computed_on_the_cpu() -> None:
    told: list[None] = []
    W = torch.ones(2, 2)
    assert with_fallback(lambda W: float(W.sum()), W, "cuda:0", lambda: told.append(None)) == 4
    assert len(told) == 1


def test_out_of_memory_on_the_cpu_is_not_hidden() -> None:
    def work(W: torch.Tensor) -> str:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        with_fallback(work, torch.zeros(2, 2), "cpu", lambda: None)


def test_out_of_memory_exits_4(
    tmp_path: Path, loftq: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(tasks, "initialize", no_room)
    outcome = loftq("quantize", "-o", tmp_path / "out")
    assert outcome.code == 4
    assert "memory" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_reference_dequantizes_as_bitsandbytes_on_the_gpu(quant_type: str) -> None:
    import bitsandbytes as bnb

    W = torch.randn(256, 512, generator=torch.Generator().manual_seed(1)).cuda()
    fmt = BlockwiseFormat(quant_type)
    ours = quantize_blockwise(W, fmt)
    theirs, state = bnb.functional.quantize_4bit(W, quant_type=quant_type, blocksize=64)
    assert torch.equal(ours.absmax, state.absmax)
    expected = dequantize_blockwise(ours)
    assert torch.equal(bnb.functional.dequantize_4bit(ours.packed, state), expected)
    # Values, not codes: FP4 has two zeros. Kernels may decide ties between two equally near levels
    # otherwise; nothing else differs.
    found = bnb.functional.dequantize_4bit(theirs, state)
    assert float((found != expected).float().mean()) < 1e-3


@pytest.mark.gpu
def test_a_run_on_the_gpu_ends_at_the_error_of_the_cpu(
    tmp_path: Path, loftq: Callable[..., Outcome]
) -> None:
    errors = []
    for device in ("cpu", "cuda"):
        outcome = loftq("quantize", "-o", tmp_path / device, "--device", device, "--json")
        assert outcome.code == 0, outcome.err
        errors.append(json.loads(outcome.out)["results"]["totals"]["weight_error_relative"])
        assert loftq("verify", tmp_path / device).code == 0
    assert errors[1] == pytest.approx(errors[0], rel=2e-3)
