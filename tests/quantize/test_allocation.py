"""Bits and ranks by what layers lose: the choices against every other choice, the numbers against
float64, the plan that follows, and the files that PEFT makes of it."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from loftq_cli.checkpoint.index import Checkpoint, open_checkpoint
from loftq_cli.core.blockwise import BlockwiseFormat
from loftq_cli.core.budgets import spread_bits, spread_ranks
from loftq_cli.core.input_moments import DAMPING
from loftq_cli.core.quantizers import Blockwise
from loftq_cli.core.rank_errors import error_shares
from loftq_cli.engines import allocation, placement
from loftq_cli.engines.adapter_settings import _pattern
from loftq_cli.engines.allocation import MOST_RANKS, allocate
from loftq_cli.engines.plan import Plan, PlannedLayer, make_plan
from loftq_cli.engines.settings import Settings
from loftq_cli.errors import NonFiniteWeight
from loftq_cli.models.layers import LinearLayer, linear_layers
from tests.battery import BATTERY
from tests.conftest import Outcome
from tests.reload import relative_error, reload, weights

LOFTQ = Callable[..., Outcome]
BITS = (2, 3, 4)


# --- spreading bits -------------------------------------------------------------------------------


def random_losses(layers: int, seed: int, widths: Sequence[int] = BITS) -> list[list[float]]:
    chance = random.Random(seed)
    return [sorted((chance.random() for _ in widths), reverse=True) for _ in range(layers)]


def total(
    losses: Sequence[Sequence[float]], bits: Sequence[int], widths: Sequence[int] = BITS
) -> float:
    return sum(loss[widths.index(each)] for loss, each in zip(losses, bits, strict=True))


def spent(bits: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(each * size for each, size in zip(bits, sizes, strict=True))


@pytest.mark.parametrize("widths", [BITS, (2, 3, 4, 8)], ids=str)
@pytest.mark.parametrize("average", [2, 2.1, 2.5, 3, 3.7, 4])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_bits_lose_less(average: float, seed: int, widths: Sequence[int]) -> None:
    sizes = random.Random(seed).choices([2048, 4096, 6144, 65536], k=6)
    lost = random_losses(6, seed, widths)
    found = spread_bits(lost, sizes, widths, average)
    assert spent(found, sizes) <= average * sum(sizes)
    least = min(
        total(lost, bits, widths)
        for bits in itertools.product(widths, repeat=6)
        if spent(bits, sizes) <= average * sum(sizes)
    )
    assert total(lost, found, widths) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("average", [2, 2.3, 2.9999, 3.6, 4])
def test_sizes_that_share_no_divisor(average: float) -> None:
    """Counted in steps that are not whole: still never above the average, and near to it."""
    sizes = [10**6 + prime for prime in (3, 33, 37, 39, 81, 99, 117, 121)] * 10
    found = spread_bits(random_losses(80, 1), sizes, BITS, average)
    unspent = average * sum(sizes) - spent(found, sizes)
    assert 0 <= unspent <= max(sizes)
    assert average not in (2, 4) or set(found) == {average}


def test_of_equal_layers_the_earlier_get_more() -> None:
    assert spread_bits([[0.15, 0.03, 0.008]] * 6, [4096] * 6, BITS, 2.5) == [3, 3, 3, 2, 2, 2]
    assert spread_bits([[0.15, 0.1, 0.0]] * 4, [4096] * 4, BITS, 3) == [4, 4, 2, 2]


def test_a_decimal_average_is_met_exactly() -> None:
    """2.1 is a little more or less than a tenth as a float."""
    for average in (2.1, 2.3, 2.7, 3.3):
        bits = spread_bits([[3.0, 2.0, 1.0]] * 10, [1024] * 10, BITS, average)
        assert sum(bits) == round(10 * average)


# --- spreading ranks ------------------------------------------------------------------------------


def gained(gains: Sequence[Sequence[float]], ranks: Sequence[int]) -> float:
    return sum(sum(gain[:rank]) for gain, rank in zip(gains, ranks, strict=True))


def paid(prices: Sequence[int], ranks: Sequence[int]) -> int:
    return sum(price * rank for price, rank in zip(prices, ranks, strict=True))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("equal", [True, False])
def test_no_other_ranks_gain_more(seed: int, equal: bool) -> None:
    chance = random.Random(seed)
    most = [chance.randint(1, 5) for _ in range(4)]
    gains = [sorted((chance.random() for _ in range(n)), reverse=True) for n in most]
    prices = [5] * 4 if equal else [chance.randint(2, 9) for _ in range(4)]
    budget = 2 * sum(prices) + chance.randint(0, 3)
    ranks = spread_ranks(gains, prices, budget)
    every = list(itertools.product(*(range(1, n + 1) for n in most)))
    best = max(gained(gains, other) for other in every if paid(prices, other) <= budget)
    assert paid(prices, ranks) <= budget
    assert all(1 <= rank <= n for rank, n in zip(ranks, most, strict=True))
    if equal:
        assert gained(gains, ranks) == pytest.approx(best)
    else:  # a knapsack: at most the one component is missed that no longer fitted
        assert gained(gains, ranks) >= best - max(map(max, gains))


def test_layers_that_gain_nothing_keep_one() -> None:
    assert spread_ranks([[0.0] * 8, [2.0, 1.0, 0.0]], [4, 4], 100) == [1, 2]


def test_of_equal_layers_the_earlier_get_the_rest() -> None:
    assert spread_ranks([[1.0] * 4] * 3, [10] * 3, 79) == [4, 2, 1]


# --- what a layer loses ---------------------------------------------------------------------------


def weight(rows: int = 128, columns: int = 192) -> torch.Tensor:
    torch.manual_seed(rows)
    return torch.randn(rows, columns) * torch.rand(rows, 1)


def moments_of(n: int) -> torch.Tensor:
    torch.manual_seed(n)
    x = torch.randn(3 * n, n) @ torch.randn(n, n)
    return x.T @ x / len(x)


@pytest.mark.parametrize("calibrated", [False, True])
def test_error_shares_against_float64(calibrated: bool) -> None:
    W, G = weight(), moments_of(192)
    quantizers = [Blockwise(BlockwiseFormat("nf4", 64, False, bits)) for bits in BITS]
    S = torch.eye(192).double()
    if calibrated:
        damped = G.double() + DAMPING * G.double().diagonal().mean() * S
        S = torch.linalg.cholesky(damped)
    norm = (W.double() @ S).square().sum()
    found = error_shares(W, quantizers, 40, input_moments=G if calibrated else None)
    for share, quantizer in zip(found, quantizers, strict=True):
        R = W.double() - quantizer.dequantize(quantizer.steps(W).quantize()[0]).double()
        assert share.quantized_only == pytest.approx(float((R @ S).square().sum() / norm), rel=1e-4)
        squares = torch.linalg.svdvals(R @ S).square()[:40] / norm
        assert share.captured == pytest.approx(squares.tolist(), rel=3e-2)
        assert sum(share.captured) == pytest.approx(float(squares.sum()), rel=2e-3)
    assert found[0].quantized_only > found[1].quantized_only > found[2].quantized_only


def test_a_weight_of_zeros_loses_nothing() -> None:
    (share,) = error_shares(torch.zeros(64, 64), [Blockwise(BlockwiseFormat("nf4", 64))], 4)
    assert (share.quantized_only, share.captured) == (0.0, (0.0,) * 4)


# --- the plan -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose layers are of several shapes and scales, in bfloat16."""
    directory = tmp_path_factory.mktemp("source")
    uneven_llama().save_pretrained(directory)
    return directory


def uneven_llama() -> Any:
    """With a heavy tail in some layers, which costs them more at few bits."""
    model = BATTERY["llama"].build(dtype=torch.bfloat16)
    torch.manual_seed(3)
    with torch.no_grad():
        for number, (name, module) in enumerate(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and "layers" in name and number % 3 == 0:
                module.weight.mul_(torch.randn_like(module.weight).exp())
    return model


def planned(directory: Path, **options: Any) -> tuple[Plan, Checkpoint]:
    checkpoint = open_checkpoint(directory)
    config = json.loads((directory / "config.json").read_text())
    infos = [info for _, info in checkpoint.tensors.values()]
    return make_plan(linear_layers(infos, config), Settings(**options)), checkpoint


class Watched:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def start(self, name: str) -> None:
        self.told.append(f"+{name}")

    def advance(self, name: str) -> None:
        self.told.append(f"-{name}")


def allocated(directory: Path, progress: Watched | None = None, **options: Any) -> Plan:
    inputs = options.pop("inputs", None)
    plan, checkpoint = planned(directory, **options)
    return allocate(
        plan,
        checkpoint,
        device="cpu",
        progress=progress or Watched(),
        inputs=inputs,
    )


def average(plan: Plan) -> float:
    size = [layer.layer.parameters for layer in plan.layers]
    return spent([layer.bits for layer in plan.layers], size) / sum(size)


def test_a_target_for_the_bits(source: Path) -> None:
    plan = allocated(source, target_bits=2.5)
    smallest = min(layer.layer.parameters for layer in plan.layers)
    whole = sum(layer.layer.parameters for layer in plan.layers)
    assert 2.5 - smallest / whole < average(plan) <= 2.5
    assert {layer.rank for layer in plan.layers} == {16}


@pytest.mark.parametrize("container", ["gptq", "compressed-tensors"])
def test_what_servers_hold_as_one_gets_one_width(source: Path, container: str) -> None:
    plan = allocated(source, target_bits=2.5, container_name=container)
    bits = {layer.layer.module: layer.bits for layer in plan.layers}
    assert len(set(bits.values())) > 1
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for block in (0, 1):
            widths = {
                width
                for module, width in bits.items()
                if f".{block}." in module and module.endswith(parts)
            }
            assert len(widths) == 1
    assert average(plan) <= 2.5


def test_where_that_decided_is_told() -> None:
    """Alone the gate would get four bits and `up` two; of the rest each has what it would have."""
    lost = {
        "gate_proj": (0.9, 0.5, 0.01),
        "up_proj": (0.02, 0.019, 0.018),
        "o_proj": (0.3, 0.1, 0.09),
    }
    layers = [
        PlannedLayer(LinearLayer(f"h.0.{name}", f"h.0.{name}", 64, 64, False, "F32"), 4, 0)
        for name in lost
    ]
    found = {
        f"h.0.{name}": [SimpleNamespace(quantized_only=loss) for loss in (*losses, 0.0)]
        for name, losses in lost.items()
    }
    settings = Settings(container_name="gptq", target_bits=3.0)
    chosen, evened = allocation._with_bits(layers, found, settings, 3.0)
    assert [each.bits for each in chosen] == [3, 3, 3]
    assert evened == [["h.0.gate_proj", "h.0.up_proj"]]
    narrow = {module: losses[:3] for module, losses in found.items()}
    apart, none = allocation._with_bits(layers, narrow, Settings(target_bits=3.0), 3.0)
    assert [each.bits for each in apart] == [4, 2, 3]
    assert none == []


def test_a_budget_of_ranks(source: Path) -> None:
    uniform, _ = planned(source, rank=4)
    plan = allocated(source, rank=4, rank_budget=True)
    ranks = [layer.rank for layer in plan.layers]
    assert len(set(ranks)) > 1
    assert min(ranks) >= 1
    assert max(ranks) <= 4 * MOST_RANKS
    dearest = max(sum(layer.shape) for layer in plan.layers)
    unspent = uniform.trainable_parameters - plan.trainable_parameters
    assert 0 <= unspent < dearest
    assert [layer.bits for layer in plan.layers] == [4] * len(ranks)
    assert not any(layer.padding for layer in plan.layers)


def test_layers_without_an_adapter_stay_without(source: Path) -> None:
    targets = ("q_proj", "down_proj")
    plan = allocated(source, rank=4, rank_budget=True, target_bits=3.0, target_modules=targets)
    adapted = {layer.layer.module.rpartition(".")[2] for layer in plan.layers if layer.adapted}
    assert adapted == set(targets)
    assert average(plan) <= 3


def test_a_uniform_rank_is_the_largest(source: Path) -> None:
    spread = allocated(source, rank=4, rank_budget=True)
    plan = allocated(source, rank=4, rank_budget=True, uniform_rank=True)
    assert [layer.rank for layer in plan.layers] == [layer.rank for layer in spread.layers]
    (stored,) = {layer.stored_rank for layer in plan.layers}
    assert stored == max(layer.rank for layer in plan.layers)


def test_every_weight_is_read_once_and_told_of(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    original = placement.load_tensor

    def counted(header: Any, info: Any) -> torch.Tensor:
        read[info.name] += 1
        return original(header, info)

    monkeypatch.setattr(placement, "load_tensor", counted)
    watched = Watched()
    plan = allocated(source, watched, rank=4, rank_budget=True, target_bits=2.5)
    assert read == Counter(layer.layer.tensor for layer in plan.layers)
    modules = [layer.layer.module for layer in plan.layers]
    assert watched.told == [f"{sign}{module}" for module in modules for sign in "+-"]


def test_moments_are_asked_for_in_their_order_and_decide(source: Path) -> None:
    """Inputs of which nearly all are silent make the rest of a weight count for nothing."""
    plain = allocated(source, rank=4, rank_budget=True)
    order = [layer.layer.module for layer in plain.layers][::-1]
    asked: list[str] = []

    def moments(module: str) -> torch.Tensor:
        asked.append(module)
        n = next(x.layer.in_features for x in plain.layers if x.layer.module == module)
        return (
            torch.diag(torch.cat((torch.ones(2), torch.zeros(n - 2)))) if n == 64 else moments_of(n)
        )

    inputs = SimpleNamespace(moments=moments, order=order, knows=order.__contains__)
    plan = allocated(source, rank=4, rank_budget=True, inputs=inputs)
    assert asked == order
    assert [layer.layer.module for layer in plan.layers] == order[::-1]
    assert [layer.rank for layer in plan.layers] != [layer.rank for layer in plain.layers]


def test_the_same_line_gives_the_same_plan(source: Path) -> None:
    options = {"rank": 4, "rank_budget": True, "target_bits": 2.7, "seed": 5}
    assert allocated(source, **options) == allocated(source, **options)


def test_a_broken_weight_is_named(source: Path, tmp_path: Path) -> None:
    model = uneven_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(NonFiniteWeight, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: "):
        allocated(tmp_path, rank_budget=True)


def test_the_tenth_block_comes_after_the_second() -> None:
    """Whatever the order in the checkpoint: of equal layers the earlier blocks get more."""
    layers = [
        PlannedLayer(LinearLayer(f"h.{block}.up", f"h.{block}.up", 64, 64, False, "F32"), 4, 0)
        for block in (0, 1, 10, 11, 2, 3)
    ]
    found = [SimpleNamespace(quantized_only=loss, captured=()) for loss in (0.15, 0.03, 0.008)]
    ordered = allocation._as_they_run(layers)
    every = {x.layer.module: found for x in layers}
    chosen, _ = allocation._with_bits(ordered, every, Settings(), 2.5)
    assert [(x.layer.module, x.bits) for x in chosen] == [
        (f"h.{block}.up", 3 if block < 3 else 2) for block in (0, 1, 2, 3, 10, 11)
    ]


# --- the files ------------------------------------------------------------------------------------


def quantized(loftq: LOFTQ, source: Path, out: Path, *options: object) -> Any:
    outcome = loftq("quantize", "-m", source, "-o", out, "--json", *options)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)["results"]


def levels_of(packed: torch.Tensor) -> int:
    """How many different codes a 4-bit weight has."""
    return len(torch.cat((packed >> 4, packed & 15)).unique())


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--target-bits", 2.5, "--rslora", "--lora-alpha", 24),
        ("--bits", "4x1,2", "--uniform-rank", "--lora-alpha", 8),
        ("--bits", 8),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_peft_loads_the_ranks_of_the_report(
    options: tuple[Any, ...], source: Path, tmp_path: Path, loftq: LOFTQ
) -> None:
    given = dict(itertools.pairwise(options))
    options = ("--rank-budget", "--iterations", 2, *options)
    results = quantized(loftq, source, tmp_path / "out", "--rank", 4, *options)
    reloaded = reload(tmp_path / "out")
    original = weights(uneven_llama())
    adapters = {
        name: module
        for name, module in reloaded.model.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }
    reported = {layer["name"]: layer for layer in results["layers"]}
    assert adapters.keys() == reported.keys()
    ranks = {name: layer["rank"] for name, layer in reported.items()}
    assert len(set(ranks.values())) > 1
    padded = max(ranks.values()) if "--uniform-rank" in options else 0
    for name, module in adapters.items():
        assert module.r["default"] == max(ranks[name], padded)
        error = relative_error(
            original[name], reloaded.dequantized[name] + reloaded.correction[name]
        )
        assert error == pytest.approx(reported[name]["weight_error_relative"], abs=1e-5)
        if given.get("--bits") != 8:
            levels = levels_of(module.base_layer.weight.data)
            assert levels <= 2 ** reported[name]["bits"] < 2 * levels
    if "4x1,2" in options:
        assert {(x["name"].split(".")[2], x["bits"]) for x in results["layers"]} == {
            ("0", 4),
            ("1", 2),
        }
    scalings = [module.scaling["default"] for module in adapters.values()]
    alpha = given.get("--lora-alpha", 4)
    scaling = alpha / (2 if "--rslora" in options else 4)
    assert scalings == pytest.approx([scaling] * len(scalings))
    trained = sum(p.numel() for p in reloaded.model.parameters() if p.requires_grad)
    shapes = [layer["shape"] for layer in results["layers"]]
    if not padded:
        assert trained == sum(ranks[x["name"]] * sum(x["shape"]) for x in results["layers"])
        assert trained <= 4 * sum(map(sum, shapes))
    else:
        assert trained == padded * sum(map(sum, shapes))


class Stacks(torch.nn.Module):
    """Two stacks of blocks, the path of one being the end of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.h = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(12))
        self.vision = torch.nn.ModuleDict(
            {"h": torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(12))}
        )


def test_peft_takes_each_pattern_for_one_module() -> None:
    model = Stacks()
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    layers = [
        PlannedLayer(LinearLayer(name, name, 8, 8, False, "F32"), 4, rank)
        for rank, name in enumerate(names, start=1)
    ]
    patterns = {_pattern(x.layer.module, layers): x.rank for x in layers if x.rank % 5}
    assert len(patterns) == sum(x.rank % 5 != 0 for x in layers)
    assert patterns["vision.h.1"] == 14, "a path that says it all stays as it is"
    config = LoraConfig(
        r=100,
        lora_alpha=50,
        rank_pattern=patterns,
        alpha_pattern={key: rank / 2 for key, rank in patterns.items()},
        target_modules=names,
    )
    adapted = get_peft_model(model, config).base_model.model
    for layer in layers:
        module = adapted.get_submodule(layer.layer.module)
        assert module.r["default"] == (layer.rank if layer.rank % 5 else 100)
        assert module.scaling["default"] == 0.5


def test_replaced_layers_keep_their_tasks(source: Path) -> None:
    """Bits and ranks change, files and what is copied do not."""
    before, _ = planned(source, target_bits=2.5, rank=4, rank_budget=True)
    after = allocated(source, target_bits=2.5, rank=4, rank_budget=True)
    assert before.left == after.left
    assert [task.file_name for task in before.tasks] == [task.file_name for task in after.tasks]
    assert before.model_bytes == after.model_bytes
    assert [replace(x, bits=4, rank=4) for x in after.layers] == before.layers
