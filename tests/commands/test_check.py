"""`loftq check`: that it passes here, that every check can fail, and what it says then."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq_cli.checks import all as all_checks
from loftq_cli.checks import kernels, layers, model, rates, roundtrip, specimens
from loftq_cli.checks.battery import Check, Finding, NothingToCheck, run_checks
from loftq_cli.core import compiled_step, lowrank
from loftq_cli.core.blockwise import BlockwiseFormat
from loftq_cli.core.codebooks import codebook
from loftq_cli.engines import job
from loftq_cli.errors import CheckFailed, LoftqError
from loftq_cli.models import costs
from loftq_cli.models.spec import DEMO_DIRECTORY
from loftq_cli.record import Progress
from tests.battery import BATTERY
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]
Refused = Callable[..., str]
Monkey = pytest.MonkeyPatch

HARDWARE = [
    *("4-bit quantization", "4-bit dequantization", "4-bit layer", "int8 kernel"),
    *(
        "compiled loops",
        "integer containers",
        "half precision",
        "matrix products",
        "memory bandwidth",
        "SVD",
    ),
]
MODEL = [
    "load",
    *(f"rank {rank}" for rank in (4, 8, 16, 32, 64)),
    *("generation", "efficiency"),
    *("targets attention", "targets projection", "targets attention+projection"),
]
NAMES = [*HARDWARE, *MODEL, "quantize", "reload"]


@pytest.fixture
def few_formats(monkeypatch: Monkey) -> None:
    """Two formats instead of all, where the point is that a check fails at all."""
    some = [
        (BlockwiseFormat("nf4", 64), torch.float32),
        (BlockwiseFormat("fp4", 4096), torch.bfloat16),
    ]
    monkeypatch.setattr(kernels, "formats", lambda: iter(some))


@pytest.fixture
def no_hardware(monkeypatch: Monkey) -> None:
    monkeypatch.setattr(all_checks, "hardware_checks", lambda device: [])


def subject(directory: Path = DEMO_DIRECTORY) -> model.Subject:
    return model.Subject(directory, "cpu", "float32", False)


def failure(body: Callable[..., Finding], *arguments: Any) -> CheckFailed:
    """What a check that has to fail says; a cause is always part of it."""
    with pytest.raises(CheckFailed) as caught:
        body(*arguments)
    assert caught.value.cause
    return caught.value


def by_name(out: str) -> dict[str, dict[str, Any]]:
    return {test["name"]: test for test in json.loads(out)["results"]["tests"]}


# --- all is well --------------------------------------------------------------------------------


def test_every_check_passes_and_says_what_it_verified(checked: Path) -> None:
    data = json.loads((checked / "stdout").read_text())
    tests = data["results"]["tests"]
    assert [test["name"] for test in tests] == NAMES
    for test in tests:
        assert test["status"] == "passed"
        assert test["cause"] is test["hint"] is None
        assert len(test["verified"]) > 15
        assert len(test["detail"]) > 15
        assert test["seconds"] > 0
        assert test["figures"] or test["rows"]
    summary = data["results"]["summary"]
    assert (summary["total"], summary["passed"]) == (len(NAMES), len(NAMES))
    assert (summary["failed"], summary["skipped"]) == (0, 0)


def test_the_figures_are_plausible(checked: Path) -> None:
    tests = by_name((checked / "stdout").read_text())
    figures = {name: test["figures"] for name, test in tests.items()}
    assert figures["4-bit quantization"]["formats"] == 2 * 8 * 3
    assert figures["4-bit dequantization"]["formats"] == 2 * 8 * 3 * 2
    assert 1e8 < figures["memory bandwidth"]["bytes_per_second"] < 1e13
    assert 1e8 < figures["matrix products"]["flops_per_second_float32"] < 1e16
    assert figures["half precision"]["error_relative_float32"] < 1e-6
    assert figures["SVD"]["remainder_gap_relative"] < 1e-4
    assert figures["rank 16"]["trainable_parameters"] == 262_144
    rows = tests["efficiency"]["rows"]
    assert [row["rank"] for row in rows] == [4, 8, 16, 32, 64]
    for row in rows:
        share = row["trainable_parameters"] / (4_273_664 + row["trainable_parameters"])
        assert row["trainable_percent"] == pytest.approx(100 * share)
        assert row["reduction_factor"] == pytest.approx(4_273_664 / row["trainable_parameters"])
    attention, projection, both = (
        figures[f"targets {name}"]["trainable_parameters"] for name in model.TARGETS
    )
    assert attention + projection == both == 90_112
    quantize = figures["quantize"]
    assert quantize["weight_error_relative"] < quantize["quantized_only_error_relative"]
    assert figures["reload"]["largest_difference"] < 1e-5
    assert figures["generation"]["tokens_per_second"] > 1


def test_both_files_are_written(checked: Path) -> None:
    (document,) = checked.glob("*.json")
    assert re.fullmatch(r"loftq_check_\d{8}T\d{6}Z\.json", document.name)
    assert document.read_text() == (checked / "stdout").read_text()
    summary = document.with_name(f"{document.stem}_summary.txt").read_text()
    assert summary.startswith(f"Checked this box with demo: {len(NAMES)} passed\n")
    for name in NAMES:
        assert f"\n{name} " in summary


# --- a broken kernel ----------------------------------------------------------------------------


def test_the_specimens_hold_every_case() -> None:
    for fmt, dtype in specimens.formats():
        W = specimens.edge_cases(fmt, dtype)
        book = codebook(fmt.quant_type)
        blocks = W.view(-1, fmt.block_size)
        assert (blocks[5] == 0).all()
        stored = specimens.all_codes(fmt, dtype, "cpu", double=False)
        assert set((stored.packed.view(-1) & 15).tolist()) == set(range(16))
        if dtype == torch.float32:
            exact = blocks[::2] / blocks[::2].abs().amax(dim=1, keepdim=True)
            edges = set(torch.cat((exact[:, 0], exact[:, -1])).tolist())
            assert set(book.midpoints().tolist()) <= edges, "a tie begins or ends a block"


@pytest.mark.usefixtures("few_formats")
@pytest.mark.parametrize("broken", ["code", "scale"])
def test_a_kernel_that_stores_something_else(broken: str, monkeypatch: Monkey) -> None:
    honest = bnb.functional.quantize_4bit

    def quantize_4bit(*arguments: Any, **options: Any) -> Any:
        packed, state = honest(*arguments, **options)
        if broken == "code":
            packed.view(-1)[700] ^= 0x10
        else:
            state.absmax[3] *= 1.0001
        return packed, state

    monkeypatch.setattr(bnb.functional, "quantize_4bit", quantize_4bit)
    error = failure(kernels.quantization, "cpu")
    place = "code 56 of block 21 of" if broken == "code" else "the scale of block 3 of"
    assert f"{place} nf4, block size 64, float32: the kernel says" in str(error.cause)
    assert "bitsandbytes" in str(error.hint)


@pytest.mark.usefixtures("few_formats")
def test_a_tie_may_go_either_way(monkeypatch: Monkey) -> None:
    """GPUs multiply with an approximate reciprocal; both levels are equally near then."""
    honest = bnb.functional.quantize_4bit
    fmt, dtype = next(kernels.formats())
    W = specimens.edge_cases(fmt, dtype)
    border = codebook("nf4").midpoints()[9]
    scaled = (W.view(-1, 64) / W.view(-1, 64).abs().amax(1, keepdim=True)).view(-1)
    tie = int((scaled == border).nonzero()[0])

    def quantize_4bit(*arguments: Any, **options: Any) -> Any:
        packed, state = honest(*arguments, **options)
        if options["blocksize"] == 64:
            packed.view(-1)[tie // 2] += 1 if tie % 2 else 16
        return packed, state

    monkeypatch.setattr(bnb.functional, "quantize_4bit", quantize_4bit)
    finding = kernels.quantization("cpu")
    assert finding.figures["ties_decided_otherwise"] == 1


@pytest.mark.usefixtures("few_formats")
def test_a_kernel_that_reads_something_else(monkeypatch: Monkey) -> None:
    honest = bnb.functional.dequantize_4bit

    def dequantize_4bit(*arguments: Any, **options: Any) -> Any:
        values = honest(*arguments, **options)
        values.view(-1)[130] = torch.nextafter(values.view(-1)[130], torch.tensor(9.0))
        return values

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", dequantize_4bit)
    error = failure(kernels.dequantization, "cpu")
    assert "value 2 of block 2 of nf4, block size 64, float32: the kernel says" in str(error.cause)


@pytest.mark.usefixtures("few_formats")
def test_compiled_loops_that_went_wrong(monkeypatch: Monkey) -> None:
    honest = compiled_step.CompiledSteps.quantize

    def quantize(*arguments: Any, **options: Any) -> Any:
        stored, left = honest(*arguments, **options)
        stored.absmax[7] += 1e-6
        return stored, left

    monkeypatch.setattr(compiled_step.CompiledSteps, "quantize", quantize)
    assert "scale 7 of nf4" in str(failure(kernels.compiled, "cpu").cause)


@pytest.mark.parametrize("when", ["forward", "inference"])
def test_a_layer_that_multiplies_wrongly(when: str, monkeypatch: Monkey) -> None:
    honest = bnb.nn.Linear4bit.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = honest(self, x)
        return 1.1 * y if self.training == (when == "forward") else y

    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", forward)
    assert (
        f"{when} through a 4-bit layer is wrong in float32" in failure(layers.four_bit, "cpu").what
    )


@pytest.mark.parametrize("broken", ["code", "scale", "value"])
def test_an_int8_kernel_that_is_wrong(broken: str, monkeypatch: Monkey) -> None:
    quant, dequant = bnb.functional.int8_vectorwise_quant, bnb.functional.int8_vectorwise_dequant

    def int8_vectorwise_quant(W: torch.Tensor) -> Any:
        codes, scb, outliers = quant(W)
        if broken == "code":
            codes[2, 5] += 1
        if broken == "scale":
            scb[4] *= 2
        return codes, scb, outliers

    monkeypatch.setattr(bnb.functional, "int8_vectorwise_quant", int8_vectorwise_quant)
    if broken == "value":
        monkeypatch.setattr(
            bnb.functional, "int8_vectorwise_dequant", lambda A, stats: dequant(A, stats) * 1.001
        )
    cause = str(failure(layers.int8, "cpu").cause)
    expected = {"code": "the code in row 2, column 5", "scale": "the scale of row 4"}
    assert expected.get(broken, "dequantizes them to other values") in cause


# --- broken arithmetic --------------------------------------------------------------------------


def test_products_that_are_wrong_in_bfloat16(monkeypatch: Monkey) -> None:
    honest = torch.Tensor.__matmul__

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = honest(a, b)
        return product * 1.1 if a.dtype == torch.bfloat16 else product

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    assert "matrix products in bfloat16 are wrong" in failure(rates.half_precision, "cpu").what


def test_memory_that_forgets(monkeypatch: Monkey) -> None:
    monkeypatch.setattr(rates, "_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: self)
    assert "memory does not hold" in failure(rates.memory_bandwidth, "cpu").what


def test_an_svd_that_is_none(monkeypatch: Monkey) -> None:
    honest = lowrank.truncated_svd

    def truncated_svd(*arguments: Any, **options: Any) -> lowrank.LowRank:
        found = honest(*arguments, **options)
        return replace(found, U=found.U * 1.01)

    monkeypatch.setattr(rates, "_SVD_SIDE", 256)
    monkeypatch.setattr(lowrank, "truncated_svd", truncated_svd)
    assert "the SVD of this device is wrong" in failure(rates.decomposition, "cpu").what


# --- a broken model -----------------------------------------------------------------------------


def test_a_count_that_is_wrong(monkeypatch: Monkey) -> None:
    honest = costs.trainable_parameters
    monkeypatch.setattr(costs, "trainable_parameters", lambda *each: honest(*each) + 1)
    error = failure(model.rank, subject(), 8)
    assert error.cause == "131,073 by the shapes in the files, 131,072 by PEFT on a fresh model"
    assert "rank 8" in failure(model.targets, subject(), "attention").what


def test_an_adapter_of_another_size(monkeypatch: Monkey) -> None:
    honest = peft.get_peft_model_state_dict

    def state_dict(*arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = honest(*arguments, **options)
        state.popitem()
        return state

    monkeypatch.setattr(peft, "get_peft_model_state_dict", state_dict)
    assert "another size than foretold" in failure(model.efficiency, subject()).what


def test_a_weight_that_is_no_number(demo: Path) -> None:
    weights = demo / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("h.2.ln_1.weight"))
    tensors[name][3] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "h.2.ln_1.weight holds NaN or infinity" in failure(model.load, subject(demo)).what


def test_an_adapter_that_changes_the_text(monkeypatch: Monkey) -> None:
    honest = model.attach_fresh

    def attach_fresh(*arguments: Any, **options: Any) -> Any:
        adapted = honest(*arguments, **options)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        return adapted

    monkeypatch.setattr(model, "attach_fresh", attach_fresh)
    subject_ = subject()
    model.load(subject_)
    error = failure(model.generation, subject_)
    assert "a new adapter changes the text" in error.what


def test_a_model_without_text_is_checked_all_the_same(tmp_path: Path) -> None:
    BATTERY["bert"].build().save_pretrained(tmp_path / "bert")
    subject_ = subject(tmp_path / "bert")
    model.load(subject_)
    with pytest.raises(NothingToCheck, match="BertForSequenceClassification does not generate"):
        model.generation(subject_)
    with ExitStack() as files:
        trip = roundtrip.RoundTrip(subject_, files)
        assert trip.quantize().figures["layers"] == 13
        assert "it writes text" not in trip.reload().detail
        assert trip.output is not None
        assert trip.output.is_dir()
    assert not trip.output.parent.exists()


def test_layers_that_the_class_calls_otherwise_or_cannot_replace(tmp_path: Path) -> None:
    for name in ("vit", "falcon"):
        BATTERY[name].build().save_pretrained(tmp_path / name)
    renamed = subject(tmp_path / "vit")
    assert model.rank(renamed, 4).figures["modules"] == 12
    assert model.targets(renamed, "projection").figures["modules"] == 4
    model.efficiency(renamed)
    for body, *more in ((model.rank, 4), (model.targets, "attention"), (model.efficiency,)):
        with pytest.raises(NothingToCheck, match="no layer of this model can be quantized"):
            body(subject(tmp_path / "falcon"), *more)


def test_files_that_are_not_what_was_measured(monkeypatch: Monkey) -> None:
    with ExitStack() as files:
        trip = roundtrip.RoundTrip(subject(), files)
        trip.quantize()
        assert trip.output is not None
        adapter = trip.output / "loftq_init" / "adapter_model.safetensors"
        tensors = load_file(adapter)
        name = next(name for name in tensors if "h.1.attn.c_attn.lora_B" in name)
        tensors[name] *= 1.2
        save_file(tensors, adapter)
        error = failure(trip.reload)
    assert error.what == "transformer.h.1.attn.c_attn is not what quantize measured"
    assert re.search(r"residual is 0\.\d{6} by the files, and 0\.\d{6} was reported", error.cause)


# --- one failure among others -------------------------------------------------------------------


@pytest.mark.usefixtures("few_formats")
def test_a_broken_kernel_is_named_and_the_rest_still_runs(
    loftq: Loftq, monkeypatch: Monkey
) -> None:
    honest = bnb.functional.dequantize_4bit
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *a, **o: honest(*a, **o) * 1.01)
    for name, small in (("_SECONDS", 0.0), ("_COPY_BYTES", 1 << 20), ("_SVD_SIDE", 256)):
        monkeypatch.setattr(rates, name, small)
    done = loftq("check", "--json")
    assert done.code == 3
    assert "Traceback" not in done.err
    tests = by_name(done.out)
    assert list(tests) == NAMES
    failed = {name for name, test in tests.items() if test["status"] == "failed"}
    assert failed >= {"4-bit dequantization", "reload"}
    assert tests["generation"]["status"] == tests["SVD"]["status"] == "passed"
    for name in failed:
        assert tests[name]["cause"]
        assert tests[name]["hint"]
    summary = json.loads(done.out)["results"]["summary"]
    assert summary["failed"] == len(failed)
    assert f"error: {len(failed)} of {len(NAMES)} checks failed: 4-bit dequant" in done.err
    assert "the kernel says" in done.err


@pytest.mark.usefixtures("no_hardware")
def test_a_truncated_model_file(demo: Path, loftq: Loftq) -> None:
    weights = demo / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = loftq("check", "--model", demo, "--format", "table")
    assert done.code == 3
    assert "Traceback" not in done.err
    assert "FAILED" in done.out
    assert "cause: it is truncated: " in done.err
    done = loftq("check", "--model", demo, "--json")
    tests = by_name(done.out)
    assert tests["load"]["status"] == tests["rank 8"]["status"] == "failed"
    assert f"{weights} cannot be used" in tests["load"]["detail"]
    assert tests["generation"]["status"] == tests["reload"]["status"] == "skipped"
    assert tests["generation"]["cause"] == "'load' failed"


@pytest.mark.usefixtures("no_hardware")
def test_no_room_for_temporary_files(loftq: Loftq, tmp_path: Path, monkeypatch: Monkey) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not-there"))
    done = loftq("check", "--json", "--quiet")
    assert done.code == 3
    tests = by_name(done.out)
    assert tests["quantize"]["status"] == "failed"
    assert "not-there" in tests["quantize"]["cause"]
    assert tests["reload"]["status"] == "skipped"
    assert {tests[name]["status"] for name in MODEL} == {"passed"}


def test_what_cannot_be_checked_at_all(quantized: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot save results in" in refused("check", "--save", tmp_path / "file" / "sub")
    assert "no model at" in refused("check", "--model", "./nowhere")
    assert "is already quantized" in refused("check", "--model", quantized)
    assert "cannot use --device cuda" in refused("check", "--device", "cuda")


def test_the_battery_goes_on_after_anything_but_a_signal() -> None:
    def passes() -> Finding:
        return Finding("fine")

    def raises(error: BaseException) -> Callable[[], Finding]:
        def body() -> Finding:
            raise error

        return body

    traces: list[int] = []
    checks = [
        Check("told", "g", "v", raises(LoftqError("what", hint="do"))),
        Check("strange", "g", "v", raises(ZeroDivisionError("division by zero"))),
        Check("memory", "g", "v", raises(MemoryError())),
        Check("nothing", "g", "v", raises(NothingToCheck("no text"))),
        Check("needs", "g", "v", passes, needs=("strange",)),
        Check("fine", "g", "v", passes, needs=("elsewhere",)),
    ]
    finished: list[str] = []
    silent = Progress()
    silent.advance = finished.append  # type: ignore[method-assign]
    outcomes = run_checks(checks, silent, trace=lambda: traces.append(1))
    assert [each.status for each in outcomes] == [
        *["failed"] * 3,
        *["skipped"] * 2,
        "passed",
    ]
    told, strange, memory, nothing, needs, _ = outcomes
    assert (told.detail, told.cause, told.hint) == ("what", "what", "do")
    assert strange.cause == "ZeroDivisionError: division by zero"
    assert (memory.cause, nothing.cause, needs.cause) == (
        "MemoryError",
        "no text",
        "'strange' failed",
    )
    assert len(traces) == 2
    assert finished == [check.name for check in checks]
    with pytest.raises(KeyboardInterrupt):
        run_checks([Check("stop", "g", "v", raises(KeyboardInterrupt()))], silent, traces.clear)


@pytest.mark.usefixtures("no_hardware")
def test_ctrl_c_ends_it_and_leaves_no_files(
    loftq: Loftq, tmp_path: Path, monkeypatch: Monkey
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(all_checks, "model_checks", lambda subject: [])

    def interrupt(*arguments: Any, **options: Any) -> None:
        assert list(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run_tasks", interrupt)
    done = loftq("check", "--json", "--quiet")
    assert (done.code, done.out) == (130, "")
    assert done.err == "error: interrupted\n"
    assert not list(tmp_path.iterdir())
    assert shutil.disk_usage(tmp_path)
