"""`--max-memory`: the level that is chosen, the same files at each, and exit 4 before starting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loftq_cli import hardware
from loftq_cli.engines.estimates import Machine, memory_bytes, plan_memory
from loftq_cli.engines.plan import Plan, make_plan
from loftq_cli.engines.settings import CalibrationText, Settings
from loftq_cli.errors import DoesNotFit, UsageError
from loftq_cli.models.layers import Inventory, LinearLayer
from loftq_cli.options import size
from tests.conftest import Outcome

MACHINE = Machine(product_bytes=2, threads=2)
# Whether the next layer is read ahead.
LEVELS = (True, False)
LOFTQ = Callable[..., Outcome]


def plan(
    *shapes: tuple[int, int], transposed: bool = False, settings: Settings | None = None
) -> Plan:
    layers = [
        LinearLayer(f"h.{i}.up", f"h.{i}.up.weight", out, into, transposed, "BF16")
        for i, (out, into) in enumerate(shapes)
    ]
    return make_plan(Inventory(list(layers)), settings or Settings())


def test_the_lightest_level_that_fits() -> None:
    large = plan((4096, 4096), (11008, 4096))
    peaks = [memory_bytes(large, MACHINE, ahead=ahead) for ahead in LEVELS]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] - peaks[1] == 11008 * 4096 * 2, "one weight in bfloat16"
    for ahead, peak in zip(LEVELS, peaks, strict=True):
        assert plan_memory(large, peak, MACHINE).ahead == ahead
        assert plan_memory(large, peak, MACHINE).peak_bytes == peak
    assert plan_memory(large, 10**15, MACHINE).ahead
    assert plan_memory(large, None, MACHINE).ahead


def test_too_little_names_the_layer_and_the_least_that_works() -> None:
    large = plan((4096, 4096), (11008, 4096))
    least = memory_bytes(large, MACHINE, ahead=False)
    with pytest.raises(DoesNotFit, match="too little") as caught:
        plan_memory(large, least - 1, MACHINE)
    assert "h.1.up (11008×4096)" in str(caught.value.cause)
    hint = str(caught.value.hint)
    works = size(hint.split()[1], "--max-memory")
    assert not plan_memory(large, works, MACHINE).ahead
    assert works - least < 10**6


@pytest.mark.parametrize("options", [{"rank_budget": True}, {"target_bits": 2.5}], ids=str)
def test_looking_at_the_losses_first_is_counted(options: dict[str, Any]) -> None:
    """It holds a float32 residual; and with a budget a layer may get four times the rank."""
    fixed, measured = (
        plan((2048, 5504), settings=Settings(rank=64, lora_alpha=64, iterations=1, **each))
        for each in ({}, options)
    )
    weights = 2048 * 5504
    for ahead in LEVELS:
        more, less = (memory_bytes(each, MACHINE, ahead=ahead) for each in (measured, fixed))
        assert more >= less
    assert more - less > weights


def test_two_streams_are_counted_unless_they_go_to_the_disk() -> None:
    """And a block's quantized weights, beside the original ones."""
    text = CalibrationText("", 1_000_000)
    parallel, sequential = (
        plan((1024, 512), (512, 1024), (512, 512), settings=Settings(
            init="calibrated", calibration=text, calibration_order=order,
        ))
        for order in ("parallel", "sequential")
    )  # fmt: skip

    def more(limit: int | None) -> int:
        one, other = (plan_memory(each, limit, MACHINE) for each in (sequential, parallel))
        return one.peak_bytes - other.peak_bytes

    streams = 2 * 1_000_000 * 512 * 2  # bfloat16, as wide as most layers' inputs
    assert streams < more(None) < streams + 50e6
    assert more(8 * streams) == more(None)
    assert more(8 * streams - 8) == more(None) - streams


def test_more_threads_hold_more_pieces() -> None:
    large = plan((8192, 8192))
    few, many = (memory_bytes(large, Machine(2, n), ahead=False) for n in (2, 16))
    assert 100e6 < many - few < 200e6


@pytest.mark.parametrize(
    ("text", "count"),
    [("1.5GB", 15 * 10**8), ("900MB", 9 * 10**8), ("4GiB", 4 * 2**30), ("123456789", 123456789)],
)
def test_sizes(text: str, count: int) -> None:
    assert size(text, "--max-memory", plain_bytes=True) == count


@pytest.mark.parametrize(
    "text", ["0", "0GB", "abc", "", "-1", "1e9", "4 GBs", "nan", "inf", "٣GB", "9" * 400 + "GB"]
)
def test_hostile_sizes(text: str, loftq: LOFTQ, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max-memory takes a size"):
        size(text, "--max-memory", plain_bytes=True)
    outcome = loftq("quantize", f"--max-memory={text}", "-o", tmp_path / "out")
    assert outcome.code == 2
    assert list(tmp_path.iterdir()) == []


def test_the_processor_is_read_without_torch() -> None:
    from loftq_cli.core.compiled_step import product_dtype

    assert hardware.product_bytes() == product_dtype().itemsize


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with layers that are just large enough for the compiled kernels."""
    directory = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture
def quantize(source: Path, loftq: LOFTQ) -> LOFTQ:
    def run(*options: object) -> Outcome:
        return loftq("quantize", "-m", source, "--rank", 4, "--device", "cpu", "--json", *options)

    return run


@pytest.fixture
def limits(quantize: LOFTQ) -> list[int]:
    """The estimates of the two levels, in bytes."""
    found: list[int] = []
    for _ in LEVELS:
        limit = ["--max-memory", found[-1] - 1] if found else []
        document = json.loads(quantize("--dry-run", *limit).out)
        found.append(document["results"]["totals"]["peak_memory_bytes"])
    return found


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.safetensors")}


def test_every_level_writes_the_same_bytes(
    quantize: LOFTQ, limits: list[int], tmp_path: Path
) -> None:
    written, fingerprints, names = [], set(), []
    for number, limit in enumerate(limits):
        out = tmp_path / str(number) / "out"
        outcome = quantize("-o", out, "--max-memory", limit)
        assert outcome.code == 0, outcome.err
        document = json.loads(outcome.out)
        fingerprints.add(document["results"]["fingerprint"])
        names.append(document["resolved"]["memory_plan"]["value"])
        assert "of --max-memory" in document["resolved"]["memory_plan"]["reason"]
        written.append(contents(out))
    assert names == ["read-ahead", "one-layer"]
    assert len(written[0]) == 2
    assert written[0] == written[1]
    assert len(fingerprints) == 1


def test_too_little_exits_4_before_anything_is_written(
    quantize: LOFTQ, limits: list[int], tmp_path: Path
) -> None:
    outcomes = [
        quantize("--max-memory", limits[-1] - 1, "-o", tmp_path / "out", *more)
        for more in ([], ["--dry-run"])
    ]
    for outcome in outcomes:
        assert outcome.code == 4
        assert outcome.out == ""
        assert "model.layers.0.mlp." in outcome.err
        assert "is the least that works" in outcome.err
    assert outcomes[0].err == outcomes[1].err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_decides_the_same_and_shows_it(
    source: Path, loftq: LOFTQ, limits: list[int]
) -> None:
    options = ("quantize", "-m", source, "--rank", 4, "--dry-run", "--max-memory", limits[1])
    document = json.loads(loftq(*options, "--json").out)
    assert document["resolved"]["memory_plan"]["value"] == "one-layer"
    assert document["results"]["totals"]["peak_memory_bytes"] == limits[1]
    shown = loftq(*options, "--format", "md").out
    assert "one-layer" in shown


def test_a_gpu_has_no_say(quantize: LOFTQ, loftq: LOFTQ, source: Path, tmp_path: Path) -> None:
    for more in ([], ["--dry-run"]):
        options = ("--device", "cuda", "--max-memory", "4GB", "-o", tmp_path / "out", *more)
        outcome = loftq("quantize", "-m", source, *options)
        assert outcome.code == 2
        assert "--device cpu" in outcome.err
