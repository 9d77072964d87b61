"""`--quant-storage` and `--adapter-dtype`: the same numbers under the names that FSDP wants."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loftq_cli.containers.base import Weight
from loftq_cli.containers.bitsandbytes4 import Bitsandbytes4
from loftq_cli.core.loftq import initialize
from loftq_cli.core.quantizers import Blockwise
from loftq_cli.engines.settings import Settings
from loftq_cli.errors import InvalidSetting
from loftq_cli.models.loading import load_model
from tests.battery import BATTERY, text_inputs
from tests.conftest import Outcome
from tests.reload import relative_error, reload, weights

Loftq = Callable[..., Outcome]
STORAGES = ("bfloat16", "float16", "float32")
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    BATTERY["llama"].build(dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def quantize(
    source: Path, tmp_path_factory: pytest.TempPathFactory, loftq: Loftq
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """A directory for these options, and its report's results; each is made once."""
    made: dict[tuple[object, ...], Path] = {}

    def run(*options: object) -> tuple[Path, dict[str, Any]]:
        if options not in made:
            made[options] = tmp_path_factory.mktemp("made") / "out"
            line = ("quantize", "-m", source, "-o", made[options], "--rank", 4, *options)
            done = loftq(*line)
            assert done.code == 0, done.err
        report = json.loads((made[options] / "loftq_report.json").read_text())
        return made[options], report["results"]

    return run


@pytest.mark.parametrize(
    ("storage", "double"), [("uint8", False), *((each, each == "bfloat16") for each in STORAGES)]
)
def test_the_bytes_are_those_that_bitsandbytes_writes(
    quantize: Any, source: Path, storage: str, double: bool, tmp_path: Path
) -> None:
    """Plain quantization by transformers in this storage, saved: every tensor, and the config."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_compute_dtype="bfloat16",
        llm_int8_skip_modules=["lm_head"],
    )
    theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    theirs.save_pretrained(tmp_path)
    flags = ["--double-quant"] if double else []
    out, results = quantize("--init", "qlora", "--quant-storage", storage, *flags)
    assert results["settings"]["quant_storage"] == storage
    found, expected = (
        load_file(out / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "quant_state" in name:  # JSON, of which the offset has a fixed width here
            one, other = (json.loads(bytes(each[name].tolist())) for each in (found, expected))
            assert one == other, name
            continue
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    written, saved = (
        json.loads((place / "config.json").read_text())["quantization_config"]
        for place in (out, tmp_path)
    )
    assert written["bnb_4bit_quant_storage"] == saved["bnb_4bit_quant_storage"] == storage
    del written["llm_int8_skip_modules"]
    assert written.items() <= saved.items()


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_everything_that_reads_a_directory_reads_it(
    quantize: Any, storage: str, tmp_path: Path, loftq: Loftq
) -> None:
    few = ("--iterations", 1)
    plain, was = quantize(*few)
    out, results = quantize(*few, "--quant-storage", storage)
    assert results["totals"]["weight_error_relative"] == was["totals"]["weight_error_relative"]
    assert results["totals"]["output_bytes"] == was["totals"]["output_bytes"]
    assert loftq("verify", out).code == 0
    theirs, ours = reload(plain), reload(out)
    weight = ours.model.get_base_model().get_submodule(LAYER).base_layer.weight
    assert weight.dtype == getattr(torch, storage)
    for name, Q in theirs.dequantized.items():
        assert torch.equal(ours.dequantized[name], Q), name
    # In another dtype than codes and files have, all the same.
    outputs = [
        load_model(each, device="cpu", dtype="float32").model(**text_inputs()).logits
        for each in (plain, out)
    ]
    assert torch.equal(*outputs)
    merged = []
    for number, each in enumerate((plain, out)):
        place = tmp_path / str(number)
        assert loftq("merge", each, "-o", place).code == 0
        merged.append((place / "model.safetensors").read_bytes())
    assert merged[0] == merged[1]
    refused = loftq("export", out, "--container", "gptq", "-o", tmp_path / "exported")
    assert refused.code == 1
    assert "no integer codes" in refused.err


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--bits", 8), "8 bits have no"),
        (("--container", "gptq"), "--container gptq has no"),
        (("--container", "compressed-tensors"), "--container compressed-tensors has no"),
        (("--init", "lora"), "--init lora does not quantize"),
    ],
)
def test_where_no_codes_are_packed_in_bytes_it_is_refused(
    source: Path, options: tuple[object, ...], why: str, tmp_path: Path, loftq: Loftq
) -> None:
    line = ("quantize", "-m", source, "-o", tmp_path / "out", *options)
    done = loftq(*line, "--quant-storage", "bfloat16")
    assert done.code == 2
    assert why in done.err
    assert not any(tmp_path.iterdir())
    done = loftq(*line, "--dry-run")
    assert done.code == 0, done.err


def test_rows_always_come_out_as_whole_words() -> None:
    """bitsandbytes cannot store an odd number of bytes so, and never has to here."""
    from bitsandbytes.functional import quantize_4bit

    odd = torch.randn(1, 6)  # three bytes
    with pytest.raises(RuntimeError, match="must be divisible by"):
        quantize_4bit(odd, quant_type="nf4", quant_storage=torch.bfloat16)
    container = Bitsandbytes4("nf4", 32, quant_storage="float32")
    assert container.why_unfit(Weight("w", "w", (1, 6), 4, "F32")) is not None
    smallest = Weight("w", "w", (1, 32), 4, "F32")  # one row of the smallest block
    assert container.why_unfit(smallest) is None
    assert (container.planned(smallest)[0].shape, container.planned(smallest)[0].nbytes) == (
        (4, 1),
        16,
    )


def test_earlier_runs_go_on() -> None:
    """Versions without these options had the same fingerprint."""
    assert not {"quant_storage", "adapter_dtype"} & Settings().as_dict().keys()
    named = Settings(quant_storage="bfloat16", adapter_dtype="float16").as_dict()
    assert (named["quant_storage"], named["adapter_dtype"]) == ("bfloat16", "float16")


STARTS = {
    "loftq": ("--iterations", 2),
    "pissa": ("--init", "pissa", "--iterations", 2),
    "qlora": ("--init", "qlora"),
    "lora": ("--init", "lora"),
    "padded": ("--iterations", 1, "--rank-budget", "--uniform-rank"),
}


@pytest.mark.parametrize(
    ("start", "dtype"), [("loftq", "float16"), *((start, "bfloat16") for start in STARTS)]
)
def test_the_error_is_that_of_the_adapter_that_is_written(
    quantize: Any, source: Path, start: str, dtype: str, loftq: Loftq
) -> None:
    out, results = quantize(*STARTS[start], "--adapter-dtype", dtype)
    _, exact = quantize(*STARTS[start])
    adapter = load_file(out / "loftq_init" / "adapter_model.safetensors")
    assert {each.dtype for each in adapter.values()} == {getattr(torch, dtype)}
    totals = results["totals"]
    assert totals["adapter_bytes"] == exact["totals"]["adapter_bytes"] // 2
    assert totals["trainable_parameters"] == exact["totals"]["trainable_parameters"]
    assert loftq("verify", out).code == 0
    if start == "lora":
        return
    original = weights(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    loaded = reload(out)
    differs = False
    for layer, before in zip(results["layers"], exact["layers"], strict=True):
        name, told = layer["name"], layer["weight_error_relative"]
        found = loaded.dequantized[name] + loaded.correction[name]
        assert told == pytest.approx(relative_error(original[name], found), abs=1e-6)
        assert told == pytest.approx(before["weight_error_relative"], rel=1e-3)
        differs |= told != before["weight_error_relative"]
    assert differs == (start != "qlora")


def test_errors_of_outputs_are_measured_on_the_rounded_adapter() -> None:
    from loftq_cli.core.blockwise import BlockwiseFormat
    from loftq_cli.core.calibrated import initialize_calibrated
    from loftq_cli.core.input_moments import output_energy

    generator = torch.Generator().manual_seed(0)
    W, x = (torch.randn(64, 64, generator=generator) for _ in range(2))
    moments, quantizer = x.T @ x / 64, Blockwise(BlockwiseFormat("nf4", 64, False, 4))
    for method in ("qera", "calibrated"):
        found = initialize_calibrated(
            W, moments, quantizer, 8, method=method, iterations=1, adapter_dtype=torch.bfloat16
        )
        for factor in (found.lora_A, found.lora_B):
            assert torch.equal(factor, factor.bfloat16().float())
        R = W - quantizer.dequantize(found.quantized) - found.lora_B @ found.lora_A
        expected = (output_energy(R, moments) / output_energy(W, moments)) ** 0.5
        assert found.output_error == pytest.approx(expected, rel=1e-4)
        assert found.error == pytest.approx(float(R.norm() / W.norm()), rel=1e-4)


def test_an_adapter_beyond_the_range_of_its_dtype_is_refused() -> None:
    from loftq_cli.core.blockwise import BlockwiseFormat

    W = 1e6 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    quantizer = Blockwise(BlockwiseFormat("nf4", 64, False, 4))
    with pytest.raises(InvalidSetting, match="does not fit into float16") as refused:
        initialize(W, quantizer, 4, scaling=1e-6, iterations=1, adapter_dtype=torch.float16)
    assert "--adapter-dtype bfloat16" in (refused.value.hint or "")
    initialize(W, quantizer, 4, scaling=1e-6, iterations=1, adapter_dtype=torch.bfloat16)
