"""Merged weights in a container again: the codes of `quantize`, with no 16-bit model on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.checkpoint.tensors import load_tensor
from tests.merge.conftest import Loftq, Trained, deviation, logits, make
from tests.rewriting import never_again, stopped_at_the_second_file
from tests.verify.conftest import edit_report, run_verify, statuses

TO_CT, TO_GPTQ = ("--container", "compressed-tensors"), ("--container", "gptq")
MIXED = ("--bits", "4x1,2", "--double-quant")
# How the directory was made, how it is quantized again, and how `quantize` says the same.
CASES = {
    "as it was": ("llama", MIXED, (), MIXED),
    "pissa": ("llama", ("--init", "pissa"), ("--block-size", 32), ("--block-size", 32)),
    "8 bits": ("llama", (), ("--bits", 8), ("--bits", 8)),
    "gptq": ("llama", TO_GPTQ, ("--bits", 3), (*TO_GPTQ, "--bits", 3)),
    "another container": ("llama", (), TO_CT, TO_CT),
    "Conv1D": ("gpt2", (), (), ()),
    "trained head": ("bert", (), (), ()),
}


def requantize(loftq: Loftq, trained: Trained, out: Path, *options: object) -> Any:
    done = loftq("merge", trained.base, "--adapter", trained.adapter, "-o", out, "--requantize",
                 *options, "--json")  # fmt: skip
    assert done.code == 0, done.err
    return json.loads(done.out)["results"]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = open_checkpoint(directory).tensors
    return {name: load_tensor(*place).view(torch.uint8) for name, place in found.items()}


@pytest.fixture(scope="module")
def sharded(loftq: Loftq, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """In several files, as a model of any size is."""
    place = tmp_path_factory.mktemp("sharded")
    return make(loftq, place, "llama", "--init", "qlora", file_bytes=20_000)


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_quantize_makes_of_the_merged_model(
    loftq: Loftq, case: str, tmp_path: Path
) -> None:
    model, made, again, same = CASES[case]
    trained = make(loftq, tmp_path, model, *made, dtype=torch.bfloat16)
    out, merged, other = (tmp_path / name for name in ("SMALL", "merged", "other"))
    results = requantize(loftq, trained, out, *again)
    assert loftq("merge", trained.base, "--adapter", trained.adapter, "-o", merged).code == 0
    # The first of its iterates has the codes of the weights themselves.
    done = loftq("quantize", "-m", merged, "-o", other, "--rank", 1, "--iterations", 1, *same)
    assert done.code == 0, done.err
    expected, found = tensors(other), tensors(out)
    assert expected.keys() == found.keys()
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]
    assert (out / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert not (out / "loftq_init").exists()
    # What it costs is what is found between the files, which verify measures for itself.
    cost = results["requantized"]
    told = json.loads((other / "loftq_report.json").read_text())["results"]
    errors = {layer["name"]: layer["weight_error_relative"] for layer in cost["layers"]}
    assert errors == pytest.approx(
        {layer["name"]: layer["backbone_error_relative"] for layer in told["layers"]}, abs=1e-6
    )
    total = cost["weight_error_relative"]
    assert total == pytest.approx(told["totals"]["backbone_error_relative"], abs=1e-6)
    assert 0 < total < 0.5
    verified, certificate = run_verify(loftq, out, "--source", merged)
    assert verified.code == 0, verified.err
    passed = statuses(certificate)
    assert {name for name, status in passed.items() if status != "passed"} <= {"forward"}
    assert passed["forward"] == "passed" or case in ("gptq", "another container")


def test_plain_libraries_load_it(loftq: Loftq, whole: Trained, tmp_path: Path) -> None:
    """As a quantized model without an adapter, near to the adapted one, and so does `loftq`."""
    out = tmp_path / "SMALL"
    results = requantize(loftq, whole, out, "--bits", 8)
    code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace('"SMALL"', repr(str(out))), scope)
    found = logits(scope["model"], whole.inputs())
    start = logits(AutoModelForCausalLM.from_pretrained(whole.base), whole.inputs())
    expected = whole.adapted("bfloat16")
    assert deviation(found, expected) < 0.25 * deviation(start, expected)
    assert results["output_deviation"] < 0.02
    loaded = loftq("load", "-m", out, "--json")
    assert loaded.code == 0, loaded.err
    assert json.loads(loaded.out)["results"]["adapter"] is None
    # Its source lies nowhere, and is not looked for.
    verified, certificate = run_verify(loftq, out)
    assert verified.code == 0, verified.err
    assert statuses(certificate)["residuals"] == "skipped"
    (out / "loftq_init").mkdir()
    assert "by the report no layer has an adapter" in loftq("verify", out).err


def test_verify_finds_what_is_wrong(loftq: Loftq, whole: Trained, tmp_path: Path) -> None:
    """Against the merged model: neither another one nor other figures pass."""
    out, merged = tmp_path / "SMALL", tmp_path / "merged"
    requantize(loftq, whole, out)
    assert loftq("merge", whole.base, "-o", merged).code == 0  # the start, not what was trained
    assert loftq("verify", out, "--source", merged).code == 3
    edit_report(
        out, lambda results: results["without_adapter"][0].update(weight_error_relative=0.01)
    )
    right = tmp_path / "right"
    assert loftq("merge", whole.base, "--adapter", whole.adapter, "-o", right).code == 0
    assert "leaves" in loftq("verify", out, "--source", right).err


def test_an_interrupted_run_goes_on(loftq: Loftq, sharded: Trained, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "SMALL"
    results = requantize(loftq, sharded, whole)
    line = ("merge", sharded.base, "--adapter", sharded.adapter, "-o", out, "--requantize")
    with stopped_at_the_second_file() as made:
        assert loftq(*line).code == 130
    assert not out.exists()
    # What was begun in another format is not mixed in, nor a plain merge.
    assert "unfinished run of other weights or settings" in loftq(*line, "--bits", 3).err
    assert "unfinished run of other weights or settings" in loftq(*line[:-1]).err
    with never_again(made):
        done = loftq(*line, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["results"]["requantized"] == results["requantized"]
    for path in whole.glob("*.safetensors*"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    again = loftq(*line, "--resume", "--json")
    assert "is already complete" in again.err
    assert json.loads(again.out)["results"]["requantized"] == results["requantized"]
    assert loftq(*line, "--resume", "--bits", 3).code == 1


def test_it_is_exported_like_any_other(loftq: Loftq, tmp_path: Path) -> None:
    """What uses a written directory takes one without an adapter."""
    trained = make(loftq, tmp_path, "llama", "--container", "gptq", "--init", "qlora")
    out, served = tmp_path / "SMALL", tmp_path / "SERVED"
    requantize(loftq, trained, out)
    done = loftq("export", out, "--container", "compressed-tensors", "-o", served)
    assert done.code == 0, done.err
    assert loftq("verify", served).code == 0
    # There is nothing to merge but what is trained on it anew.
    assert "there is no such directory" in loftq("merge", out, "-o", tmp_path / "none").err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--bits", 3), 2, "hint: add --requantize"),
        (("--requantize", "--bits", 5), 2, "--bits '5' is not supported"),
        (("--requantize", "--block-size", 48), 2, "no block size 48"),
        (("--requantize", "--container", "gptq", "--block-size", 16), 2, "no block size 16"),
        (("--requantize", "--bits", 8, "--block-size", 64), 0, ""),
        (("--requantize", "--bits", 8, "--block-size", 32), 2, "8 bits have no"),
    ],
)
def test_formats(
    loftq: Loftq, whole: Trained, options: tuple[Any, ...], code: int, said: str, tmp_path: Path
) -> None:
    done = loftq("merge", whole.base, "-o", tmp_path / "out", *options)
    assert done.code == code, done.err
    assert said in done.err
    assert (tmp_path / "out").exists() == (code == 0)


def test_a_directory_that_is_not_quantized(loftq: Loftq, tmp_path: Path) -> None:
    trained = make(loftq, tmp_path, "llama", "--init", "lora")
    done = loftq("merge", trained.base, "-o", tmp_path / "out", "--requantize")
    assert done.code == 2
    assert "is not quantized" in done.err
