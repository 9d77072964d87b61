"""`--distill-steps`: adapters trained on the calibration text when the layers are finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional

import loftq_cli
from loftq_cli import quantize, verify
from loftq_cli.engines.estimates import Machine, distilling_bytes, plan_memory, seconds
from loftq_cli.engines.settings import CalibrationText, Settings, settings_of
from loftq_cli.errors import DoesNotFit, LoftqError, UnsupportedModel, UsageError
from loftq_cli.models import distillation
from loftq_cli.models.evaluation import Evaluation
from loftq_cli.options import QuantizeOptions
from loftq_cli.report import units
from tests.battery import BATTERY, Entry
from tests.conftest import Outcome
from tests.quantize.test_killed import contents
from tests.quantize.test_memory import plan
from tests.reload import reload

DEMO = Path(loftq_cli.__file__).parent / "demo"
WINDOW, STEPS = 64, 3
# Ranks that differ, padded, and of 16 bits.
OPTIONS: dict[str, Any] = {
    "init": "calibrated", "rank": 4, "iterations": 1, "bits": 2, "lora_alpha": 7,
    "rank_budget": True, "uniform_rank": True, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loftq_cli.models.texts.LONGEST_WINDOW", WINDOW)
        patch.setattr("loftq_cli.engines.shards.SHARD_BYTES", 30_000)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text((DEMO / "calibration.txt").read_text("utf-8")[:4_000], "utf-8")
    return path


def save(name: str, directory: Path, **changed: Any) -> Path:
    entry = BATTERY[name]
    config = {**entry.config, "vocab_size": 4096, **changed}
    model = Entry(entry.model_class, entry.config_class, config).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that what is quantized shows in the predictions
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def start(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the closed form gives."""
    out = tmp_path_factory.mktemp("start") / "out"
    quantize(str(llama), output=out, calibration_text=text, **OPTIONS)
    return out


@pytest.fixture(scope="module")
def distilled(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distilled") / "out"
    quantize(str(llama), output=out, calibration_text=text, distill_steps=STEPS, **OPTIONS)
    return out


def results(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "loftq_report.json").read_text("utf-8"))
    return found["results"]


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "loftq_init" / "adapter_model.safetensors")


def windows_of(source: Path, text: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    ids = torch.tensor(tokenizer(text.read_text("utf-8"))["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def test_it_is_the_loop_that_is_written_here(
    llama: Path, start: Path, distilled: Path, text: Path
) -> None:
    """In float64, on what plain transformers, bitsandbytes and peft load, with the real ranks."""
    ranks = {each["name"]: each["rank"] for each in results(start)["layers"]}
    assert len({*ranks.values()}) > 1
    teacher = transformers.LlamaForCausalLM.from_pretrained(llama).double()
    student = transformers.LlamaForCausalLM.from_pretrained(llama).double()
    loaded, before, factors = reload(start, "LlamaForCausalLM"), adapter(start), {}
    scaling = OPTIONS["lora_alpha"] / OPTIONS["rank"]
    for name, rank in ranks.items():
        A, B = (before[f"base_model.model.{name}.lora_{which}.weight"].double() for which in "AB")
        A, B = A[:rank].clone().requires_grad_(), B[:, :rank].clone().requires_grad_()
        factors[name] = A, B

        def forward(x: Any, Q: Any = loaded.dequantized[name], A: Any = A, B: Any = B) -> Any:
            return x @ Q.double().T + scaling * (x @ A.T) @ B.T

        student.get_submodule(name).forward = forward
    trained = [factor for pair in factors.values() for factor in pair]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-4, STEPS)
    windows, generator = windows_of(llama, text), torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(9)])
    for step in range(STEPS):
        batch = windows[order[8 * step : 8 * step + 8]]
        with torch.no_grad():
            target = teacher(batch).logits.log_softmax(-1).flatten(0, 1)
        predicted = student(batch).logits.log_softmax(-1).flatten(0, 1)
        functional.kl_div(predicted, target, log_target=True, reduction="batchmean").backward()
        optimizer.step()
        optimizer.zero_grad()
        cycle.step()
    after = adapter(distilled)
    for name, pair in factors.items():
        for which, factor in zip("AB", pair, strict=True):
            key = f"base_model.model.{name}.lora_{which}.weight"
            rank = ranks[name]
            # B as its transpose, so that either has a row for each rank.
            old, new, wanted = (
                tensor if which == "A" else tensor.T
                for tensor in (before[key], after[key], factor.detach())
            )
            moved, expected = new[:rank] - old[:rank], wanted - old[:rank]
            assert moved.abs().max() > 1e-5
            # AdamW divides by tiny gradients too.
            assert (moved - expected).norm() < 0.02 * expected.norm(), key
            assert torch.equal(new[rank:], old[rank:])


def test_codes_stay_and_figures_are_those_of_the_files(
    llama: Path, start: Path, distilled: Path, text: Path
) -> None:
    for file in start.glob("model*"):
        assert file.read_bytes() == (distilled / file.name).read_bytes()
    document = json.loads((distilled / "loftq_report.json").read_text("utf-8"))
    assert document["resolved"]["distill_dtype"]["value"] == "float32"
    told = document["results"]
    run = told["distillation"]
    windows = windows_of(llama, text)
    assert {key: run[key] for key in ("steps", "batch", "window_length", "tokens")} == {
        "steps": STEPS, "batch": 8, "window_length": WINDOW, "tokens": windows.numel(),
    }  # fmt: skip
    original = transformers.LlamaForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        p = original(windows).logits[:, :-1].log_softmax(-1).double()
        for directory, key in ((start, "kl_before"), (distilled, "kl_after")):
            q = reload(directory, "LlamaForCausalLM").model(windows).logits[:, :-1]
            q = q.log_softmax(-1).double()
            assert run[key] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert run["kl_after"] < run["kl_before"]
    assert run["dtype"] == "float32"
    assert not any(each["error_curve"] for each in told["layers"])
    assert all(each["iterations"] == 1 for each in told["layers"])
    assert verify(distilled, source=str(llama)).results.summary.passed
    assert told["settings"]["distill_steps"] == STEPS
    assert told["totals"]["output_error_relative"] is None
    card = (distilled / "README.md").read_text("utf-8")
    assert f"trained for {STEPS} steps of 8 windows of {WINDOW} tokens" in card
    assert units.small(run["kl_after"]) in card
    errors = {each["name"]: each["weight_error_relative"] for each in results(start)["layers"]}
    assert all(each["weight_error_relative"] != errors[each["name"]] for each in told["layers"])


@pytest.mark.parametrize("at", ["distilling", "after it"])
def test_interrupted_runs_end_in_the_same_bytes(
    at: str, llama: Path, distilled: Path, text: Path, tmp_path: Path
) -> None:
    def run() -> None:
        quantize(
            str(llama), output=tmp_path / "out", calibration_text=text, distill_steps=STEPS,
            **OPTIONS,
        )  # fmt: skip

    def fail(*arguments: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        if at == "distilling":
            patch.setattr(torch.optim.AdamW, "zero_grad", fail)
        else:
            patch.setattr("loftq_cli.engines.output.write_model_files", fail)
        with pytest.raises(KeyboardInterrupt):
            run()
    partial = tmp_path / "out.partial" / "output"
    if at == "after it":  # what was followed is not there any more to follow it again
        next(iter(sorted(partial.glob("model*")))).unlink()
        run()
    else:
        with pytest.MonkeyPatch.context() as patch:  # all layers are kept
            patch.setattr("loftq_cli.engines.tasks.initialize", fail)
            run()
    assert contents(tmp_path / "out") == contents(distilled)


def test_several_processes_and_conv1d_end_in_the_same_bytes(text: Path, tmp_path: Path) -> None:
    source = save("gpt2", tmp_path / "source", n_layer=2)
    asked: dict[str, Any] = {**OPTIONS, "rank_budget": False, "uniform_rank": False}
    asked |= {"container": "gptq", "block_size": 32, "adapter_dtype": "bfloat16"}
    for workers in (1, 2):
        quantize(
            str(source), output=tmp_path / str(workers) / "out", calibration_text=text,
            distill_steps=2, workers=workers, target_modules="c_attn,c_fc", **asked,
        )  # fmt: skip
    one, two = (contents(tmp_path / str(workers) / "out") for workers in (1, 2))
    assert one == two
    told = results(tmp_path / "1" / "out")
    assert told["distillation"]["kl_after"] < told["distillation"]["kl_before"]
    assert len(told["without_adapter"]) == 4
    assert verify(tmp_path / "1" / "out", source=str(source)).results.summary.passed


def test_what_comes_to_no_number_or_is_no_nearer_is_not_written(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    """One run after the other goes on with the first one's layers, in the dtype that was asked."""
    out, dtypes = tmp_path / "out", set()
    asked: dict[str, Any] = {**OPTIONS, "init": "qera", "iterations": "auto", "dtype": "bfloat16"}

    def run(**patched: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in patched.items():
                patch.setattr(distillation, name, value)
            return quantize(
                str(llama), output=out, calibration_text=text, distill_steps=STEPS, **asked
            )

    def no_number(student: Any, windows: torch.Tensor, reference: Any) -> Evaluation:
        dtypes.add(reference.model.dtype)
        return Evaluation((0.0,), float("nan"))

    with pytest.raises(LoftqError, match="cannot be distilled") as before:  # and no step is taken
        run(evaluate=no_number, _batches=None)
    with pytest.raises(LoftqError, match="came to no number") as after:
        run(LEARNING_RATE=1e30)
    for caught in (before, after):
        assert "--force" in str(caught.value.hint)
    assert not out.exists()
    assert dtypes == {torch.bfloat16}
    start = {}
    for part in (tmp_path / "out.partial" / "output").rglob("*.safetensors"):
        start |= {name: each for name, each in load_file(part).items() if ".lora_" in name}
    document = run(LEARNING_RATE=0.3)
    assert any("left as they were before it" in each for each in document.warnings)
    told = document.results.distillation
    assert told.kl_after == told.kl_before
    assert told.dtype == "bfloat16"
    written = adapter(out)
    assert start.keys() == written.keys()
    assert all(torch.equal(start[name], written[name]) for name in written)
    assert "no nearer after 3 steps" in (out / "README.md").read_text("utf-8")
    found = verify(out, source=str(llama)).results
    assert found.summary.passed
    assert "calibration text" not in found.model_dump_json()


def test_windows_come_in_one_random_order_after_the_other() -> None:
    windows = torch.arange(5)[:, None]
    batches = distillation._batches(windows, 3)
    seen = torch.cat([next(batches) for _ in range(10)]).flatten().view(-1, 5)
    assert (seen.sort(1).values == torch.arange(5)).all()
    assert len({tuple(order.tolist()) for order in seen}) > 5
    assert not torch.equal(next(distillation._batches(windows, 4)).flatten()[:5], seen[0])


def test_what_has_no_effect_or_no_sense_is_refused(
    text: Path, tmp_path: Path, loftq: Callable[..., Outcome]
) -> None:
    with pytest.raises(UsageError, match="--distill-steps has no effect with --init loftq"):
        settings_of(QuantizeOptions(distill_steps=10))
    with pytest.raises(UsageError, match="distill-steps 0 is too small"):
        settings_of(QuantizeOptions(init="qera", calibration_text=text, distill_steps=0))
    line = ("quantize", "--init", "calibrated", "--calibration-text", text, "--distill-steps")
    assert loftq(*line, 0, "-o", tmp_path / "out").code == 2


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("mixtral", {"container": "compressed-tensors", "block_size": 32}, "quantized experts"),
        ("t5", {}, "causal language models, not for T5"),
    ],
)
def test_models_that_cannot_be_distilled_are_refused_before_they_are_read(
    name: str, options: dict[str, Any], says: str, text: Path, tmp_path: Path
) -> None:
    source = save(name, tmp_path / "source")
    for more in ({"dry_run": True, "preflight": True}, {"output": tmp_path / "out"}):
        asked = {"calibration_text": text, "init": "calibrated", "distill_steps": 1}
        with pytest.raises(UnsupportedModel, match=says):
            quantize(str(source), **asked, **options, **more)  # type: ignore[arg-type]
    assert not (tmp_path / "out.partial").exists()


def test_a_cpu_without_room_for_it_is_refused_before_layers_are_made(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loftq_cli.hardware.memory_bytes", lambda: 700_000_000)
    with pytest.raises(DoesNotFit, match="700 MB of memory of this machine") as caught:
        quantize(
            str(llama), output=tmp_path / "out", calibration_text=text, distill_steps=1, **OPTIONS
        )
    assert caught.value.exit_code == 4
    assert not [*tmp_path.iterdir()]


def test_memory_and_time_are_told_before() -> None:
    calibrated = {"init": "calibrated", "calibration": CalibrationText("", 4096)}
    shapes = [(4096, 4096)] * 40
    without, with_it = (
        plan(*shapes, settings=Settings(**calibrated, distill_steps=steps))  # type: ignore[arg-type]
        for steps in (None, 100)
    )
    weights = sum(out * into for out, into in shapes)
    needed = distilling_bytes(with_it)
    assert 8 * weights < needed < 8 * weights + 10**10
    halved = replace(with_it, settings=replace(with_it.settings, dtype="bfloat16"))
    assert needed - distilling_bytes(halved) == 4 * weights
    before, after = (plan_memory(each, None, Machine()) for each in (without, with_it))
    assert after.peak_bytes > max(before.peak_bytes, needed)
    assert "to distill the adapters" in after.reason
    assert plan_memory(with_it, after.peak_bytes, Machine()).ahead == after.ahead
    with pytest.raises(DoesNotFit, match="too little for --distill-steps"):
        plan_memory(with_it, needed, Machine())
    assert plan_memory(without, needed, Machine())
    assert plan_memory(with_it, None, Machine(memory_bytes=needed)) == after
    with pytest.raises(DoesNotFit, match=r"the .* GB of memory of this machine is too little"):
        plan_memory(with_it, None, Machine(memory_bytes=needed, distills=True))
    assert plan_memory(with_it, None, Machine(), 2).peak_bytes >= after.peak_bytes
    assert seconds(with_it) > seconds(without)
