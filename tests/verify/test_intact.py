"""What is as it was written passes: every format, several architectures, any way to the source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli import hardware
from loftq_cli.checks.written.claims import ClaimedLayer
from loftq_cli.checks.written.residuals import spread
from loftq_cli.engines import shards
from tests.battery import BATTERY
from tests.verify.conftest import Loftq, edit_json, reseal, run_verify, statuses

CHECKS = ["files", "container", "adapter", "totals", "residuals", "copies", "forward"]
NO_SOURCE = {"residuals": "skipped", "copies": "skipped"}


def found(results: dict[str, Any], check: str) -> Any:
    return next(test for test in results["tests"] if test["name"] == check)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", ()),
        ("llama", ("--quant-type", "fp4", "--double-quant", "--block-size", 32)),
        ("llama", ("--bits", 8, "--lora-alpha", 24, "--rslora")),
        ("llama", ("--target-modules", "q_proj,v_proj", "--init", "qlora")),
        ("llama", ("--bits", "3x1,2", "--init", "loftq-plain", "--double-quant")),
        ("llama", ("--target-bits", 2.5, "--rank-budget", "--lora-alpha", 24)),
        (
            "llama",
            ("--rank-budget", "--uniform-rank", "--rslora", "--target-modules", "q_proj,up_proj"),
        ),
        ("llama", ("--init", "lora")),
        ("gpt2", ("--init", "lora", "--rslora")),
        ("gpt2", ("--double-quant",)),
        ("bert", ()),
        ("t5", ()),
        ("vit", ()),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)),
)
def test_an_intact_directory(
    name: str, options: tuple[Any, ...], tmp_path: Path, loftq: Loftq
) -> None:
    BATTERY[name].build(dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    if not {"qlora", "lora"} & set(options):  # which do not iterate
        options = (*options, "--iterations", 1)
    done = loftq("quantize", "-m", tmp_path / "source", "-o", tmp_path / "out", "--json",
                 "--rank", 4, *options)  # fmt: skip
    assert done.code == 0, done.err
    written = json.loads(done.out)["results"]
    outcome, results = run_verify(loftq, tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert statuses(results) == dict.fromkeys(CHECKS, "passed")
    layers = written["layers"] + written["without_adapter"]
    assert results["measured_layers"] == len(layers)
    assert results["quantized_layers"] == (0 if "lora" in options else len(layers))
    assert {layer["name"] for layer in results["layers"]} == {layer["name"] for layer in layers}
    assert results["summary"]["passed"] == results["summary"]["total"] == len(CHECKS)


def test_the_page_says_what_was_proved(source: Path, tmp_path: Path, loftq: Loftq) -> None:
    """Bits and ranks as they are, and of an unquantized directory nothing about codes."""
    out = tmp_path / "out"
    loftq("quantize", "-m", source, "-o", out, "--rank", 4, "--iterations", 1,
          "--target-bits", 2.5, "--rank-budget")  # fmt: skip
    details = {test["name"]: test["detail"] for test in run_verify(loftq, out)[1]["tests"]}
    assert "with the codes of 2 bits" in details["container"]
    assert details["adapter"].startswith("ranks ")

    out = tmp_path / "plain"
    loftq("quantize", "-m", source, "-o", out, "--rank", 4, "--init", "lora")
    outcome, results = run_verify(loftq, out)
    assert outcome.code == 0, outcome.err
    container = next(test for test in results["tests"] if test["name"] == "container")
    assert "nothing is quantized" in container["detail"]
    assert "bitsandbytes" not in container["verified"]
    page = loftq("verify", out, "--format", "table").out
    assert "none quantized" in page


def test_a_report_from_before_there_was_a_search(
    source: Path, tmp_path: Path, loftq: Loftq
) -> None:
    """Then a layer without an adapter had plain quantization and one field that told its error."""
    out = tmp_path / "out"
    loftq("quantize", "-m", source, "-o", out, "--rank", 4, "--init", "qlora",
          "--target-modules", "q_proj")  # fmt: skip

    def older(report: Any) -> None:
        for layer in report["results"]["without_adapter"]:
            del layer["weight_error_relative"]

    edit_json(out / "loftq_report.json", older)
    outcome, results = run_verify(loftq, out)
    assert outcome.code == 0, outcome.err
    assert statuses(results) == dict.fromkeys(CHECKS, "passed")


def test_a_report_from_before_the_readme_was_listed(written: Path, loftq: Loftq) -> None:
    def older(report: Any) -> None:
        files = report["results"]["files"]
        report["results"]["files"] = [each for each in files if each["name"] != "README.md"]

    edit_json(written / "loftq_report.json", older)
    (written / "README.md").write_text("Notes of mine.")
    outcome, results = run_verify(loftq, written)
    assert outcome.code == 0, outcome.err
    assert statuses(results) == dict.fromkeys(CHECKS, "passed")


def test_an_adapter_from_before_it_said_its_base(written: Path, loftq: Loftq) -> None:
    config = written / "loftq_init" / "adapter_config.json"
    edit_json(config, lambda adapter: adapter.pop("auto_mapping"))
    reseal(written)
    outcome, results = run_verify(loftq, written)
    assert outcome.code == 0, outcome.err
    assert statuses(results) == dict.fromkeys(CHECKS, "passed")


def test_several_weight_files(
    source: Path, tmp_path: Path, loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    loftq("quantize", "-m", source, "-o", tmp_path / "out", "--rank", 4, "--iterations", 1)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    outcome, results = run_verify(loftq, tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert statuses(results) == dict.fromkeys(CHECKS, "passed")


def test_a_sample_is_measured_and_the_document_says_so(written: Path, loftq: Loftq) -> None:
    outcome, results = run_verify(loftq, written, "--sample", 5)
    assert outcome.code == 0, outcome.err
    assert (results["quantized_layers"], results["measured_layers"]) == (14, 5)
    assert "5 of 14 layers" in found(results, "residuals")["detail"]
    again = run_verify(loftq, written, "--sample", 5)[1]
    assert again["layers"] == results["layers"]


def test_a_sample_is_spread_over_the_model_and_over_kinds() -> None:
    kinds = ("q", "k", "v", "o", "gate", "up", "down")
    layers = [
        ClaimedLayer(f"layers.{block}.{kind}", (1, 1), 4, 1, 1, 0.1, 0.2)
        for block in range(32)
        for kind in kinds
    ]
    chosen = spread(layers, 32)
    assert [layer.name.split(".")[1] for layer in chosen] == [str(block) for block in range(32)]
    assert {layer.name.split(".")[2] for layer in chosen} == set(kinds)
    assert spread(layers, 500) == spread(layers, None) == layers


def test_without_the_source_the_rest_is_verified(written: Path, source: Path, loftq: Loftq) -> None:
    moved = source.rename(source.with_name("moved"))
    outcome, results = run_verify(loftq, written)
    assert outcome.code == 0, outcome.err
    assert statuses(results) == {**dict.fromkeys(CHECKS, "passed"), **NO_SOURCE}
    assert "--source" in found(results, "residuals")["cause"]
    assert (results["source"], results["layers"]) == (None, [])

    outcome, results = run_verify(loftq, written, "--source", moved)
    assert outcome.code == 0, outcome.err
    assert (results["source"], results["measured_layers"]) == (str(moved), 14)


def test_the_source_from_the_hubs_cache(
    written: Path, source: Path, tmp_path: Path, loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report's commit is looked for, and a directory that has the model's name is not it."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    identity = {"id": "org/name", "revision": "0123abc", "source": "hub"}
    edit_json(written / "loftq_report.json", lambda report: report.update(model=identity))
    outcome, results = run_verify(loftq, written)
    assert (outcome.code, statuses(results)["residuals"]) == (0, "skipped")
    assert "org/name@0123abc, is not on this disk" in found(results, "residuals")["cause"]

    snapshots = tmp_path / "hub" / "models--org--name" / "snapshots"
    snapshots.mkdir(parents=True)
    source.rename(snapshots / "0123abc")
    for options in ((), ("--source", "org/name@0123abc")):
        outcome, results = run_verify(loftq, written, *options)
        assert outcome.code == 0, outcome.err
        assert (results["source"], statuses(results)["residuals"]) == ("org/name", "passed")


def test_the_same_weights_in_other_files_are_the_source(
    written: Path, tmp_path: Path, loftq: Loftq
) -> None:
    model = BATTERY["llama"].build(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "resharded", max_shard_size="50KB")
    outcome, results = run_verify(loftq, written, "--source", tmp_path / "resharded")
    assert outcome.code == 0, outcome.err
    assert "these weights are the same" in found(results, "residuals")["detail"]


def test_a_directory_may_be_renamed_and_go_through_git_and_hub(
    written: Path, tmp_path: Path, loftq: Loftq
) -> None:
    blobs = tmp_path / "blobs"
    snapshot = tmp_path / "cache" / "snapshots" / "abc"
    shutil.copytree(written, blobs)
    for file in sorted(path for path in blobs.rglob("*") if path.is_file()):
        link = snapshot / file.relative_to(blobs)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    (snapshot / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (snapshot / ".cache" / "huggingface").mkdir(parents=True)
    (snapshot / ".cache" / "huggingface" / "CACHEDIR.TAG").touch()
    outcome, results = run_verify(loftq, snapshot)
    assert outcome.code == 0, outcome.err
    assert statuses(results) == dict.fromkeys(CHECKS, "passed")


def test_a_model_that_does_not_fit_is_not_run(
    written: Path, loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "memory_bytes", lambda: 100_000)
    outcome, results = run_verify(loftq, written)
    assert outcome.code == 0, outcome.err
    assert statuses(results)["forward"] == "skipped"
    assert "this box has 0.0001" in found(results, "forward")["cause"]
