"""`loftq report`: what it reads, what it passes over, and what it makes of the numbers."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from loftq_cli import cli, schema
from loftq_cli.options import Options, QuantizeOptions, SweepOptions
from loftq_cli.report.advice import recommendations
from loftq_cli.report.findings import findings
from loftq_cli.schema import RESULTS
from tests.cli import documents
from tests.commands.conftest import piped
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]
Documents = Callable[..., dict[str, Any]]
Refused = Callable[..., str]

LOFTQ = f"{shlex.quote(sys.executable)} -m loftq_cli"


def enveloped(command: str, results: dict[str, Any], **envelope: Any) -> dict[str, Any]:
    return {
        "schema": f"loftq/{command}",
        "schema_version": "1.0",
        "tool": {"name": "loftq", "version": "0.1.0"},
        "argv": ["loftq", command],
        "model": {"id": "org/name", "revision": None, "source": "hub"},
        "resolved": {},
        "environment": {
            "python": "3.11.7",
            "platform": "Linux",
            "machine": "x86_64",
            "cpu_count": 8,
            "memory_bytes": 64_000_000_000,
            "packages": {"torch": "2.13.0"},
        },
        "results": results,
        **envelope,
    }


LOAD = enveloped(
    "load",
    {
        "architecture": "LlamaForCausalLM",
        "parameters": 6_738_415_616,
        "parameter_bytes": 13_476_831_232,
        "bytes_by_dtype": {"bfloat16": 13_476_831_232},
        "load_seconds": 20.0,
        "peak_memory_bytes": 16_000_000_000,
        "device": "cpu",
        "dtype": "bfloat16",
    },
    timings_seconds={"resolve": 1.0, "build": 3.0, "read": 16.0},
)


def layer(name: str, curve: list[float], seconds: float = 1.0) -> dict[str, Any]:
    return {
        "name": name,
        "shape": [4096, 4096],
        "bits": 4,
        "rank": 16,
        "weight_error_relative": min(curve),
        "quantized_only_error_relative": 0.1,
        "iterations": len(curve),
        "best_iteration": curve.index(min(curve)) + 1,
        "error_curve": curve,
        "seconds": seconds,
        "bytes": 2 * 4096**2,
        "share_of_bytes": 0.4,
    }


def quantize(*layers: dict[str, Any], after: float = 0.07, **settings: Any) -> dict[str, Any]:
    return enveloped(
        "quantize",
        {
            "output": "OUT",
            "architecture": "LlamaForCausalLM",
            "settings": {
                "bits": 4,
                "quant_type": "nf4",
                "block_size": 64,
                "double_quant": False,
                "rank": 16,
                "lora_alpha": 16,
                "iterations": 3,
                "target_modules": ["all-linear"],
                "seed": 0,
            }
            | settings,
            "layers": layers,
            "untouched": [
                {
                    "name": "embed.weight",
                    "shape": [8, 8],
                    "reason": "embedding",
                    "bytes": 90,
                    "share_of_bytes": 0.18,
                },
                {
                    "name": "norm.weight",
                    "shape": [8],
                    "reason": "not a matrix",
                    "bytes": 10,
                    "share_of_bytes": 0.02,
                },
            ],
            "totals": {
                "weight_error_relative": after,
                "quantized_only_error_relative": 0.1,
                "input_bytes": 100_000_000,
                "output_bytes": 30_000_000,
                "adapter_bytes": 3_000_000,
                "peak_memory_bytes": 1,
                "parameters": 50_000_000,
                "trainable_parameters": 750_000,
                "seconds": 10.0,
            },
        },
    )


def said(*data: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Findings and recommendations of these documents."""
    documents = [schema.document_of(each) for each in data]
    return (
        [each.text for each in findings(documents)],
        [each.text for each in recommendations(documents)],
    )


# --- reading ------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path, quantized: Path) -> Path:
    """A directory such as people have: results of several commands among other files."""
    directory = tmp_path / "results"
    directory.mkdir()
    here = json.loads((quantized / "loftq_report.json").read_text())
    check = {**documents.ALL["check"], "environment": here["environment"], "model": here["model"]}
    for name in ("loftq_check_20261126T120000Z.json", "stdout"):
        (directory / name).write_text(json.dumps(check))
    (directory / "loftq_check_20261126T120000Z.txt").write_text("Check of this box: passed\n")
    shutil.copy(quantized / "loftq_report.json", directory)
    shutil.copy(quantized / "config.json", directory)
    (directory / "load.json").write_text(json.dumps(LOAD))
    (directory / "broken.json").write_text('{"schema": "loftq/load"')
    (directory / "old.json").write_text(json.dumps({**LOAD, "schema_version": "0.3"}))
    (directory / "nested").mkdir()
    return directory


def test_a_directory(
    results: Path, document: Documents, loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = document("report", results)
    read = [Path(each["file"]).name for each in data["results"]["documents"]]
    assert read[0] == "load.json"
    assert read[1].startswith("loftq_check_")
    assert read[2] == "loftq_report.json"
    skipped = {Path(each["file"]).name: each["reason"] for each in data["results"]["skipped"]}
    assert skipped["config.json"].startswith("this is not a loftq result document")
    assert skipped["broken.json"].startswith("this is not JSON (")
    assert skipped["old.json"].startswith("cannot read version 0.3 of loftq/load")
    assert skipped["nested"] == "a directory"
    assert skipped["stdout"] == "neither a .json nor a .html file"
    assert len(skipped) == 5, "the summary beside a document is not worth a word"
    assert len(data["results"]["systems"]) == 2
    whole = data["results"]["documents"][0]["document"]
    assert LOAD["results"].items() <= whole["results"].items()
    monkeypatch.chdir(results.parent)  # a long path would be broken over lines
    for form in ("table", "md", "tsv"):
        done = loftq("report", results.name, "--format", form)
        assert (done.code, done.err) == (0, "")
        for name in ("config.json", "broken.json", "old.json"):
            assert name in done.out


def test_every_form_has_every_part(results: Path, loftq: Loftq) -> None:
    page = loftq("report", results, "--format", "table").out
    parts = ["Report on 3 result documents", "System", "Checked this box with demo", "Loaded org/"]
    parts += ["Wrote ", "Findings", "Recommendations", "Skipped"]
    places = [page.index(f"\n{part}" if place else part) for place, part in enumerate(parts)]
    assert places == sorted(places)
    markdown = loftq("report", results, "--format", "md").out
    assert markdown.startswith("## Report on 3 result documents\n")
    for heading in ("## System", "## Findings", "## Recommendations", "### check, demo"):
        assert f"\n{heading}\n" in markdown
    header, *records = loftq("report", results, "--format", "tsv").out.splitlines()
    assert header == "kind\tfile\tcommand\tmodel\ttext"
    assert {record.split("\t")[0] for record in records} == {
        *("result", "finding", "recommendation", "skipped")
    }


def test_several_on_stdin_in_a_row_or_as_an_array(tmp_path: Path, document: Documents) -> None:
    several = [{**LOAD, "argv": ["loftq", "load", str(number)]} for number in range(3)]
    first, second, third = map(json.dumps, several)
    row = f"{first}\n{second}{third}"
    for content in (row, json.dumps(several), json.dumps(several, indent=2)):
        with piped(content.encode(), tmp_path):
            data = document("report", "-")
        assert [each["file"] for each in data["results"]["documents"]] == ["-"] * 3
        assert len(data["results"]["systems"]) == 1


def test_a_report_is_read_back_as_what_it_was_made_from(
    results: Path, tmp_path: Path, document: Documents
) -> None:
    first = document("report", results / "load.json", results / "loftq_report.json")
    (tmp_path / "report.json").write_text(json.dumps(first))
    second = document("report", tmp_path / "report.json")
    assert [each["document"] for each in second["results"]["documents"]] == [
        each["document"] for each in first["results"]["documents"]
    ]
    assert second["results"]["findings"] == first["results"]["findings"]


def test_a_document_that_is_met_twice_counts_once(
    results: Path, document: Documents, loftq: Loftq
) -> None:
    data = document("report", results / "load.json", results, results / "load.json")
    assert len(data["results"]["documents"]) == 3
    assert loftq("report", results, "--save", results).code == 0
    assert len(document("report", results)["results"]["documents"]) == 3


def test_other_minor_versions(tmp_path: Path, document: Documents, refused: Refused) -> None:
    """A later one has keys that are not known here; an earlier one lacks keys that are."""
    file = tmp_path / "load.json"
    later = {**LOAD, "schema_version": "1.7", "carbon": 3, "results": {**LOAD["results"], "x": 1}}
    file.write_text(json.dumps(later))
    (read,) = document("report", file)["results"]["documents"]
    assert read["document"]["results"]["parameters"] == 6_738_415_616
    assert read["document"]["results"]["peak_device_memory_bytes"] is None
    file.write_text(json.dumps({**LOAD, "schema_version": "2.0"}))
    error = refused("report", file)
    assert f"error: {file}: cannot read version 2.0 of loftq/load" in error
    assert "hint: " in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}', "this is not a loftq result document"),
        (b"loss 0.3\n", "this is not JSON"),
        (b"\xff\xfe{}", "this is not JSON"),
        (b"[[" * 100_000, "cause: it is nested too deeply"),
        (b"  \n", "is empty"),
        (b'{"schema": "loftq/load", "schema_version": "1.0"}', "document is damaged"),
        (b'{"schema": "loftq/dance", "schema_version": "1.0"}', "cannot read loftq/dance"),
        (json.dumps(LOAD).encode() + b" and more", "this is not JSON"),
    ],
)
def test_what_is_no_document_is_refused(
    content: bytes, message: str, tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(content)
    error = refused("report", file)
    assert message in error
    assert str(file) in error


def test_nothing_to_read(tmp_path: Path, refused: Refused) -> None:
    assert f"cannot read {tmp_path}/nowhere" in refused("report", tmp_path / "nowhere", code=2)
    assert "cause: there are no files in it" in refused("report", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "config.json: this is not a loftq result document" in refused("report", tmp_path)
    with piped(b"", tmp_path):
        error = refused("report", "-")
    assert "error: stdin is empty" in error
    assert "missing argument 'FILES'" in refused("report", code=2)


def test_no_torch_is_imported(results: Path) -> None:
    code = f"""
import sys
from loftq_cli.cli import main
assert main(["report", {str(results)!r}, "--format", "table"]) == 0
print(sorted({{name.partition(".")[0] for name in sys.modules}}), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    imported = set(eval(done.stderr.splitlines()[-1]))
    assert not imported & {"torch", "transformers", "peft", "bitsandbytes", "numpy"}


def test_the_pipe_that_people_write() -> None:
    line = f"set -o pipefail; {LOFTQ} sweep-ranks --json | {LOFTQ} report - --format md | head -12"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=False, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## Report on 1 result document\n\n## System\n")
    assert done.stderr == ""


# --- findings -----------------------------------------------------------------------------------


def test_what_loading_says() -> None:
    found, advised = said(LOAD)
    assert found == [
        "reading the weights is 80.0 % of loading, at 842 MB a second",
        "loading takes 25.0 % of this box's 64.0 GB of memory at its peak",
    ]
    assert advised == []
    gpu = {
        **LOAD["environment"],
        "accelerators": [{"name": "RTX", "memory_bytes": 24_000_000_000}],
    }
    _, advised = said({**LOAD, "environment": gpu})
    assert advised == [
        (
            "quantize before fine-tuning: the weights alone are 56.2 % of the GPU's 24.0 GB "
            "(loftq quantize --model org/name --output OUT)"
        )
    ]


def test_what_quantizing_says() -> None:
    found, advised = said(
        quantize(
            layer("q_proj", [0.09, 0.085, 0.08], 1.0),
            layer("k_proj", [0.08, 0.07, 0.075], 3.0),
            double_quant=True,
        )
    )
    assert found == [
        (
            "backbone and adapter together take away 30.0 % of the error that plain quantization "
            "makes in the weights: 10.0 % becomes 7.00 %"
        ),
        "the most weight error is left in q_proj: 8.00 %",
        "the slowest of 2 layers is k_proj: 3.00 s, 75.0 % of the time of all",
        "in 1 of 2 layers an iterate before the last is the best, most often number 2: k_proj",
        "20.0 % of the bytes stay as they were, the most of it embed.weight (18.0 %: embedding)",
        (
            "the backbone has 4.80 bits a parameter, all tensors counted; the adapter adds 10.0 % "
            "to its size"
        ),
    ]
    assert advised == []


def test_what_to_do_about_a_quantization() -> None:
    _, fewer = said(quantize(layer("a", [0.08, 0.07, 0.071]), layer("b", [0.07, 0.071, 0.08])))
    assert fewer == [
        (
            "--iterations 2 gives the same result in about 66.7 % of the time: no layer's best "
            "iterate comes later"
        ),
        "add --double-quant to save 1.56 MB, 5.22 % of the backbone",
    ]
    integers = {"container": "gptq", "quant_type": "int", "block_size": 32}
    whole = quantize(layer("a", [0.09, 0.08, 0.07]), after=0.09)
    whole["results"]["settings"] |= integers
    _, (sweep, more) = said(whole)
    assert more.startswith("try --iterations")
    assert "--container gptq --block-size 32" in sweep
    assert "--quant-type" not in sweep
    _, more = said(quantize(layer("a", [0.09, 0.08, 0.07]), after=0.09, double_quant=True))
    assert more == [
        (
            "see what a higher rank would buy: rank 16 takes away only 10.0 % of the weight error "
            "(loftq sweep-ranks --model org/name --error)"
        ),
        "try --iterations 6: the last one still took 12.5 % of the error away",
    ]
    _, settled = said(quantize(layer("a", [0.08, 0.0701, 0.07]), double_quant=True))
    assert settled == []


def test_what_a_calibrated_quantization_says() -> None:
    """Of outputs, bits and ranks, and nothing of iterations that nobody asked for."""
    found, advised = said(documents.ALL["quantize-calibrated"])
    text = "\n".join(found)
    assert "60.0 % of the error that plain quantization makes in the layers' outputs" in text
    assert "the most output error is left in" in text
    assert "of 38 layers: 4 bits in 25, 2 bits in 13" in found
    assert any(each.startswith("ranks go from 4 to 40, the highest in") for each in found)
    assert "how many iterations pay was left to each layer: 2" in found
    assert not any("--iterations" in each or "higher rank" in each for each in advised)


def test_a_distilled_quantization_is_not_judged_by_its_weights() -> None:
    document = copy.deepcopy(documents.ALL["quantize-distilled"])
    totals = document["results"]["totals"]
    totals["weight_error_relative"] = 0.99 * totals["quantized_only_error_relative"]
    found, advised = said(document)
    assert any(each.startswith("distilling the adapters: KL") for each in found)
    assert not any("weight error" in each or "in the weights" in each for each in found)
    assert not any("higher rank" in each for each in advised)
    del document["results"]["distillation"]  # else it says both
    found, advised = said(document)
    assert any("weight error" in each for each in found)
    assert any("higher rank" in each for each in advised)


def test_an_error_of_weights_that_grew_is_explained() -> None:
    data = copy.deepcopy(documents.ALL["quantize-calibrated"])
    data["results"]["totals"]["weight_error_relative"] = 0.12
    found, _ = said(data)
    assert found[0] == (
        "backbone and adapter together add to the error that plain quantization makes in the "
        "weights: 9.36 % becomes 12.0 % (this start was fitted to outputs, not to weights)"
    )


def test_what_is_not_quantized_has_no_error_to_speak_of() -> None:
    data = quantize(layer("a", [0.0]), after=0.0, bits=16, init="lora", block_size=None)
    data["results"]["totals"]["quantized_only_error_relative"] = 0.0
    found, advised = said(data)
    assert not any("error" in each for each in (*found, *advised))


def generated(adapter: str | None, rates: tuple[float, float]) -> dict[str, Any]:
    generations = [
        {
            "prompt": prompt,
            "generated_text": "x",
            "new_tokens": 20,
            "seconds": 20 / rate,
            "tokens_per_second": rate,
        }
        for prompt, rate in zip(("short", "a prompt that is far too long"), rates, strict=True)
    ]
    return enveloped(
        "generate",
        {
            "generations": generations,
            "average_seconds": 1.0,
            "average_tokens_per_second": sum(rates) / 2,
            "max_new_tokens": 20,
            "device": "cpu",
            "dtype": "bfloat16",
            "adapter": adapter,
        },
    )


def test_what_generation_says() -> None:
    found, advised = said(generated(None, (30.0, 30.1)), generated("loftq_init", (30.0, 20.0)))
    assert found == [
        (
            "the slowest of 2 prompts ('a prompt that is far too long') runs at 20.0 tokens/s, the "
            "fastest ('short') at 30.0"
        ),
        "with the adapter loftq_init generation runs at 25.0 tokens/s, without one at 30.1",
    ]
    assert advised == []


def checked_box(**changes: Any) -> dict[str, Any]:
    """A check of an imaginary box, with other figures for its products."""
    products = {
        "flops_per_second_float32": 1e11,
        "flops_per_second_bfloat16": 5e11,
        "flops_per_second_float16": 1e9,
        "threads": 2,
        "flops_per_second_float32_one_thread": 0.6e11,
    }
    tests = [
        {
            "name": "matrix products",
            "group": "hardware",
            "status": "passed",
            "seconds": 1.0,
            "verified": "v",
            "detail": "d",
            "figures": products | changes,
        },
        {
            "name": "efficiency",
            "group": "model",
            "status": "passed",
            "seconds": 1.0,
            "verified": "v",
            "detail": "d",
            "rows": [{"rank": rank, "memory_bytes": 10_000_000_000 * rank} for rank in (4, 8, 16)],
        },
        {
            "name": "reload",
            "group": "main job",
            "status": "failed",
            "seconds": 1.0,
            "verified": "v",
            "detail": "it is off",
            "cause": "a bit flipped",
            "hint": "buy memory",
        },
    ]
    summary = {"total": 3, "passed": 2, "failed": 1, "seconds": 3.0}
    return enveloped(
        "check",
        {"tests": tests, "summary": summary},
        resolved={"dtype": {"value": "float32", "reason": "auto"}},
    )


def test_what_a_box_says() -> None:
    found, advised = said(checked_box())
    assert found == [
        "reload failed: it is off: a bit flipped",
        "bfloat16 products are 5.00 times as fast as float32's here",
        "float16 products are 100 times slower than float32's",
        "2 threads multiply 1.67 times as fast as one",
    ]
    assert advised == [
        "for reload: buy memory",
        (
            "compute with --dtype bfloat16 on this box: its products are 5.00 times as fast as "
            "float32's"
        ),
        (
            "choose ranks up to 4 for 4-bit fine-tuning: 40.0 GB of the 64.0 GB of this box's "
            "memory (it has no GPU), by the estimate for one sequence of 512 tokens"
        ),
    ]


def test_a_busy_box_is_seen() -> None:
    found, advised = said(checked_box(flops_per_second_float32_one_thread=3e11))
    assert (
        "one thread multiplies 3.00 times as fast as 2 together: something else has the cores"
        in (found)
    )
    assert advised[1].startswith("set OMP_NUM_THREADS=1 while this box is this busy")


def test_what_the_other_commands_say() -> None:
    """Sweeps, targets, certificates and exports, as the samples of all documents have them."""
    found, advised = said(documents.ALL["sweep-ranks"], documents.ALL["targets"])
    assert any("gpt2" in text or "rank" in text for text in found)
    assert found[0] == documents.ALL["sweep-ranks"]["results"]["verdict"]["sentence"]
    assert any(text.startswith("loftq quantize --model gpt2 --rank") for text in advised)
    assert any("--init calibrated --calibration-text" in text for text in advised)
    found, advised = said(documents.ALL["export"])
    assert found == [
        (
            "the same codes take 4.25 bits a weight in compressed-tensors, and 4.31 in gptq: "
            "gpt2-served and gpt2-loftq are the same model"
        )
    ]


@pytest.mark.parametrize("name", documents.ALL)
def test_every_kind_of_document_is_understood(name: str) -> None:
    found, advised = said(documents.ALL[name])
    assert found or name in ("report", "quantize-dry-run")
    for text in (*found, *advised):
        assert "None" not in text
        assert "nan" not in text.split()


def test_nothing_is_said_without_numbers() -> None:
    bare = checked_box()
    bare["results"]["tests"] = []
    assert said(bare) == ([], [])
    plain = {**LOAD, "timings_seconds": {}}
    plain["environment"] = {**LOAD["environment"], "memory_bytes": None}
    assert said(plain) == ([], [])


def test_the_advice_of_a_comparison_is_the_line_that_was_measured() -> None:
    content = documents.compare()
    content["results"]["settings"] |= {
        "calibration_text": "my text.txt", "quant_type": "fp4", "block_size": 128,
        "double_quant": True, "iterations": "3", "lora_alpha": 8.0, "rslora": True,
        "target_modules": ["c_attn", "c_proj"], "seed": 3,
    }  # fmt: skip
    best = content["results"]["verdict"]["bits"][0]
    best |= {"bits": 4, "init": "pissa", "rank": 4, "gain": True}
    assert best["trained_init"] == "calibrated"
    assert said(content)[1] == [], "trained, it did not gain"
    best |= {"trained_gain": True, "trained_learning_rate": 0.008}
    _, (advice,) = said(content)
    line = (
        f"loftq quantize --model {content['model']['id']} --bits 4 --rank 16 --init calibrated "
        "--calibration-text 'my text.txt' --quant-type fp4 --block-size 128 --double-quant "
        "--iterations 3 --lora-alpha 8 --rslora --target-modules c_attn,c_proj --seed 3 "
        "--output OUT"
    )
    assert advice == f"{line} (it trained best at a learning rate of 0.008)"
    content["results"]["settings"] |= {"train_steps": None, "train_text": None}
    best |= {"init": "calibrated", "rank": 16}
    assert said(content)[1] == [line], "untrained, the nearest"


def other_value(option: str) -> Any:
    """A value that is not the default."""
    return {
        "bits": 2, "quant_type": "fp4", "block_size": 128, "double_quant": True, "iterations": "3",
        "lora_alpha": 8.5, "rslora": True, "target_modules": ["c_attn", "c_proj"], "seed": 3,
        "container": "gptq", "experts": "keep",
    }[option]  # fmt: skip


def changeable(settings: type[BaseModel], advised: type[Options]) -> list[str]:
    """The settings that the advised command has an option for, texts aside: nobody has those."""
    options = {field.name for field in fields(advised)}  # type: ignore[arg-type]
    return sorted(options & set(settings.model_fields) - {"calibration_text"})


ADVISED = [
    *(("sweep-ranks", name) for name in changeable(schema.SweepSettings, QuantizeOptions)),
    *(("compare", name) for name in changeable(schema.CompareSettings, QuantizeOptions)),
    *(("quantize", name) for name in changeable(schema.QuantizeSettings, SweepOptions)),
]


@pytest.mark.parametrize(("command", "option"), ADVISED)
def test_an_advised_line_asks_for_what_was_measured(command: str, option: str) -> None:
    """Every setting that the advised command has an option for, as its own parser reads it."""
    content = copy.deepcopy(documents.ALL[command])
    value = other_value(option)
    # What experts became is said of each method; the settings have all that was asked for.
    content["results"]["settings"][option] = [value] if option == "experts" else value
    if command == "quantize":  # a correction that takes little away calls for a sweep
        content["results"]["totals"] |= {
            "quantized_only_error_relative": 0.1, "weight_error_relative": 0.09,
            "quantized_only_output_error_relative": None, "output_error_relative": None,
        }  # fmt: skip
    if command == "compare":
        content["results"]["verdict"]["bits"][0] |= {
            "bits": 4, "trained_init": "loftq", "trained_gain": True, "trained_learning_rate": 1.0,
        }  # fmt: skip
        if option in ("container", "experts"):  # each verdict has its own
            content["results"]["verdict"]["bits"][0][option] = value
    _, advised = said(content)
    line = next(match[1] for text in advised if (match := re.search(r"(loftq [^()]*)", text)))
    wanted = ",".join(value) if isinstance(value, list) else str(value)
    assert str(parsed(line)[option]) == wanted


def parsed(line: str) -> dict[str, Any]:
    _, command, *arguments = shlex.split(line)
    found = typer.main.get_command(cli.app).get_command(None, command)
    context = found.make_context(command, arguments)
    return dict(context.params)


def test_what_fits_in_16_bits_is_advised_in_16_bits() -> None:
    content = copy.deepcopy(documents.ALL["sweep-ranks"])
    content["results"]["settings"] |= {
        "bits": 16, "quant_type": None, "block_size": None, "calibration": None,
    }  # fmt: skip
    content["results"]["quantized_parameters"] = 0
    _, advised = said(content)
    assert any("--init lora" in text and "--bits" not in text for text in advised)


def test_a_report_has_a_place_for_the_document_of_every_command() -> None:
    assert set(RESULTS) == set(cli.COMMANDS)
