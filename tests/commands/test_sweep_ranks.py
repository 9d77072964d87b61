"""`loftq sweep-ranks`: the figures of the design note, at once, offline, and without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loftq_cli.core.blockwise import BlockwiseFormat, dequantize_blockwise, quantize_blockwise
from loftq_cli.models.spec import DEMO_DIRECTORY
from tests.battery import BATTERY
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]

# Runs a command line; anything that opens a socket, and any heavy import, is written to stderr.
WATCHED = """
import sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        print("NETWORK", event, arguments, file=sys.stderr)
sys.addaudithook(hook)
from loftq_cli.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "huggingface_hub", "peft", "bitsandbytes", "numpy", "safetensors"}
print("IMPORTED", *sorted(heavy & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def results(loftq: Loftq, *argv: object) -> dict[str, Any]:
    outcome = loftq("sweep-ranks", *argv, "--json")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)["results"]
    return found


def watched(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WATCHED, *argv],
        capture_output=True,
        text=True,
        env=os.environ | environ,
        check=False,
        timeout=60,
    )


def test_gpt2_has_the_figures_of_the_design_note(loftq: Loftq) -> None:
    found = results(loftq, "-m", "gpt2", "--target-modules", "c_attn,c_proj")
    keys = ("rank", "trainable_parameters", "trainable_percent", "reduction_factor")
    assert [tuple(cost[key] for key in keys) for cost in found["ranks"]] == [
        (4, 405_504, 0.3248, 306.88),
        (8, 811_008, 0.6475, 153.44),
        (16, 1_622_016, 1.2867, 76.72),
        (32, 3_244_032, 2.5407, 38.36),
        (64, 6_488_064, 4.9554, 19.18),
    ]
    assert found["base_parameters"] == 124_439_808
    for cost in found["ranks"]:
        assert cost["total_parameters"] == 124_439_808 + cost["trainable_parameters"]
        assert cost["adapter_bytes"] == 4 * cost["trainable_parameters"]


@pytest.mark.parametrize(
    ("targets", "trainable"),
    [
        ("c_attn", 294_912),
        ("c_proj", 516_096),
        ("c_attn,c_proj", 811_008),
        ("all-linear", 1_179_648),
    ],
)
def test_targets_at_rank_8(loftq: Loftq, targets: str, trainable: int) -> None:
    found = results(loftq, "-m", "gpt2", "--ranks", "8", "--target-modules", targets)
    assert found["ranks"][0]["trainable_parameters"] == trainable


def test_the_default_is_all_linear_as_in_quantize(loftq: Loftq) -> None:
    found = results(loftq, "-m", "gpt2", "--ranks", 8)
    assert found["settings"]["target_modules"] == ["all-linear"]
    assert found["ranks"][0]["trainable_parameters"] == 1_179_648


@pytest.mark.parametrize("container", ["bitsandbytes", "gptq"])
@pytest.mark.parametrize("command", ["sweep-ranks", "targets"])
def test_no_torch_and_no_network_for_a_known_model(
    command: str, container: str, tmp_path: Path
) -> None:
    done = watched(
        command,
        "-m",
        "gpt2",
        "--container",
        container,
        "--json",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["source"] == "known"
    assert "NETWORK" not in done.stderr
    assert done.stderr.splitlines()[-1] == "IMPORTED"


@pytest.mark.parametrize("form", ["table", "tsv", "md"])
def test_no_torch_for_files_in_any_form(form: str) -> None:
    done = watched("sweep-ranks", "--format", form)
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stderr
    assert done.stderr.splitlines()[-1] == "IMPORTED"


def test_only_headers_are_read(loftq: Loftq, tmp_path: Path) -> None:
    """The weights are not even there: the file ends with its header and a hole."""
    shutil.copy(DEMO_DIRECTORY / "config.json", tmp_path)
    whole = (DEMO_DIRECTORY / "model.safetensors").read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(whole[:head])
        file.truncate(len(whole))
    assert results(loftq, "-m", tmp_path)["ranks"] == results(loftq, "-m", "demo")["ranks"]


def test_every_term_of_the_memory_is_shown_and_adds_up(loftq: Loftq) -> None:
    for bits in (4, 8, 16):
        for cost in results(loftq, "-m", "gpt2", "--bits", bits, "--batch-size", 3)["ranks"]:
            memory = dict(cost["memory"])
            total = memory.pop("total_bytes")
            checkpointed = memory.pop("total_with_checkpointing_bytes")
            less = memory.pop("activations_with_checkpointing_bytes")
            assert total == sum(memory.values())
            assert checkpointed == total - memory["activations_bytes"] + less


def test_the_sequence_length_follows_the_model(loftq: Loftq) -> None:
    outcome = loftq("sweep-ranks", "--json")
    document = json.loads(outcome.out)
    assert document["results"]["settings"]["sequence_length"] == 256
    assert document["resolved"]["sequence_length"]["reason"] == "all that the model can read"
    longer = loftq("sweep-ranks", "--sequence-length", 512, "--json")
    assert "warning: this model reads 256 tokens at once, not 512" in longer.err
    assert json.loads(longer.out)["results"]["settings"]["sequence_length"] == 512


# --- what fits ----------------------------------------------------------------------------------


def test_vram_marks_what_fits(loftq: Loftq) -> None:
    argv = ("-m", "meta-llama/Llama-3.1-8B", "--sequence-length", 512)
    found = results(loftq, *argv, "--vram", "13.5GB")
    fits = [cost["fits"] for cost in found["ranks"]]
    assert fits == [cost["memory"]["total_bytes"] <= 13.5e9 for cost in found["ranks"]]
    assert fits == sorted(fits, reverse=True)
    assert set(fits) == {True, False}
    assert all(cost["fits_with_checkpointing"] for cost in found["ranks"])
    verdict = found["verdict"]
    largest = max(cost["rank"] for cost in found["ranks"] if cost["fits"])
    assert (verdict["recommended_rank"], verdict["reason"]) == (largest, "memory")
    assert verdict["sentence"].startswith(f"Rank {largest}: the largest of these that fits")


def test_what_fits_only_with_checkpointing_is_said_to(loftq: Loftq) -> None:
    found = results(loftq, "-m", "llama", "--vram", "10GB", "--sequence-length", 2048)
    assert not any(cost["fits"] for cost in found["ranks"])
    assert found["verdict"]["recommended_rank"] == 64
    assert "with gradient checkpointing" in found["verdict"]["sentence"]


def test_nothing_fits_is_exit_code_4_with_the_result_printed(loftq: Loftq) -> None:
    outcome = loftq("sweep-ranks", "-m", "Llama-2-70b", "--vram", "24GB", "--json")
    assert outcome.code == 4
    found = json.loads(outcome.out)["results"]
    assert found["verdict"]["recommended_rank"] is None
    assert not any(cost["fits_with_checkpointing"] for cost in found["ranks"])
    what, cause, hint = outcome.err.strip().splitlines()
    assert what == "error: no rank fits in 24GB"
    assert cause.startswith("cause: Nothing fits in 24.0 GB: rank 4 takes about ")
    assert hint.startswith("hint: a shorter --sequence-length")


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("800mb", 8 * 10**8)]
)
def test_sizes(loftq: Loftq, text: str, size: int) -> None:
    outcome = loftq("sweep-ranks", "-m", "gpt2", "--vram", text, "--json")
    assert json.loads(outcome.out)["results"]["settings"]["vram_bytes"] == size


def test_without_an_error_and_a_limit_the_verdict_goes_by_cost(loftq: Loftq) -> None:
    verdict = results(loftq, "-m", "meta-llama/Llama-2-7b-hf")["verdict"]
    assert verdict["reason"] == "cost"
    assert verdict["sentence"].startswith(f"Rank {verdict['recommended_rank']}: up to here ")


# --- the error ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
def test_the_error_is_that_of_a_float64_svd_of_every_residual(
    loftq: Loftq, tiny: Path, bits: int
) -> None:
    """Of plain quantization, and with the scales searched for, of what is left of that."""
    ranks = (2, 8, 16)
    argv = ("-m", tiny, "--error", "--bits", bits, "--ranks", ",".join(map(str, ranks)))
    found = results(loftq, *argv, "--target-modules", "c_attn,c_proj")
    weights = load_file(tiny / "model.safetensors")
    norm, plain, left = 0.0, 0.0, dict.fromkeys(ranks, 0.0)
    for name, tensor in weights.items():
        if tensor.dim() != 2 or ".h." not in name:
            continue
        W = tensor.T.contiguous()
        form = BlockwiseFormat("nf4", 64, False, bits)
        norm += float(W.double().square().sum())
        Q = dequantize_blockwise(quantize_blockwise(W, form))
        plain += float((W.double() - Q.double()).square().sum())
        Q = dequantize_blockwise(quantize_blockwise(W, form, search=True))
        R = W.double() - Q.double()
        squares = torch.linalg.svdvals(R).square()
        for rank in ranks:
            adapted = name.endswith(("c_attn.weight", "c_proj.weight"))
            left[rank] += float(squares[rank if adapted else 0 :].sum())
    assert found["quantized_only_error_relative"] == pytest.approx((plain / norm) ** 0.5, rel=1e-5)
    for cost in found["ranks"]:
        expected = (left[cost["rank"]] / norm) ** 0.5
        assert cost["weight_error_relative"] == pytest.approx(expected, rel=5e-4)
        removed = 1 - cost["weight_error_relative"] / found["quantized_only_error_relative"]
        assert cost["weight_error_removed"] == pytest.approx(removed)
        assert cost["output_error_relative"] is cost["output_error_removed"] is None


@pytest.mark.parametrize(
    "form",
    [(), ("--container", "gptq", "--bits", 2, "--block-size", -1),
     ("--container", "compressed-tensors", "--bits", 3, "--block-size", 32)],
)  # fmt: skip
def test_the_error_is_what_quantize_reports_after_one_iteration(
    loftq: Loftq, tmp_path: Path, form: tuple[object, ...]
) -> None:
    BATTERY["llama"].build().save_pretrained(tmp_path / "model")
    found = results(loftq, "-m", tmp_path / "model", "--error", "--ranks", "8", *form)
    outcome = loftq("quantize", "-m", tmp_path / "model", "-o", tmp_path / "out", "--rank", 8,
                    "--iterations", 1, "--json", *form)  # fmt: skip
    totals = json.loads(outcome.out)["results"]["totals"]
    error = found["ranks"][0]["weight_error_relative"]
    assert error == pytest.approx(totals["weight_error_relative"], rel=1e-3)
    plain = totals["quantized_only_error_relative"]
    assert found["quantized_only_error_relative"] == pytest.approx(plain, rel=1e-5)


def test_the_measured_verdict_says_what_the_doublings_bought(loftq: Loftq) -> None:
    found = results(loftq, "--error", "--ranks", "4,64")
    errors = [cost["weight_error_relative"] for cost in found["ranks"]]
    assert found["quantized_only_error_relative"] > errors[0] > errors[1]
    assert found["verdict"]["reason"] == "error"
    assert found["verdict"]["recommended_rank"] == 64
    assert "the last doubling still took away" in found["verdict"]["sentence"]
    little = results(loftq, "--error", "--ranks", "4,8")["verdict"]
    assert little["recommended_rank"] == 4
    assert "no further doubling takes away more than" in little["sentence"]


def test_8_bits_are_measured_and_16_have_nothing_to_measure(loftq: Loftq) -> None:
    found = results(loftq, "--error", "--ranks", "8", "--bits", 8)
    assert found["quantized_only_error_relative"] < 0.02
    outcome = loftq("sweep-ranks", "--error", "--bits", 16)
    assert (outcome.code, outcome.out) == (2, "")


def test_fewer_bits_take_the_memory_of_four_and_say_so(loftq: Loftq) -> None:
    four = results(loftq, "-m", "gpt2", "--ranks", "8")
    for bits in (2, 3):
        found = results(loftq, "-m", "gpt2", "--ranks", "8", "--bits", bits)
        assert found["ranks"] == four["ranks"]
        assert (found["settings"]["bits"], found["settings"]["quant_type"]) == (bits, "nf4")
    page = loftq("sweep-ranks", "-m", "gpt2", "--bits", 2, "--format", "md").out
    assert "codes of 2 bits in the 4-bit container, which has no smaller ones" in page


def test_integers_take_the_memory_of_their_bits(loftq: Loftq) -> None:
    """2 bits and, for every 64 weights, a 16-bit scale and a zero point of 2 bits."""

    def held(*form: object) -> tuple[int, int, int]:
        memory = results(loftq, "-m", "gpt2", "--ranks", "8", *form)["ranks"][0]["memory"]
        return memory["weights_bytes"], memory["absmax_bytes"], memory["workspace_bytes"]

    weights, inputs = 84_934_656, 12 * (3 * 768 + 3072)  # of 12 blocks
    for bits in (2, 8):
        found = held("--container", "gptq", "--bits", bits)
        assert found[:2] == (
            weights * bits // 8, weights // 64 * 2 + weights // 64 * bits // 8 + 4 * inputs,
        )  # fmt: skip
    found = results(loftq, "-m", "gpt2", "--container", "gptq", "--bits", 2, "--block-size", -1)
    assert found["settings"]["container"] == "gptq"
    assert found["settings"]["block_size"] == -1
    page = loftq("sweep-ranks", "-m", "gpt2", "--bits", 2, "--container", "gptq").out
    assert "container, which has no smaller" not in page
    page = loftq("sweep-ranks", "-m", "gpt2", "--bits", 2, "--container", "gptq", "--format",
                 "md").out  # fmt: skip
    assert "int2 in blocks of 64 (gptq) for" in page


def test_what_is_trained_dequantized_takes_the_memory_of_16_bits(loftq: Loftq) -> None:
    """PEFT has no layer for compressed-tensors' codes."""
    model = ("-m", "meta-llama/Llama-3.1-8B", "--ranks", "8")
    plain = results(loftq, *model, "--bits", 16)["ranks"][0]["memory"]
    asked = ("--container", "compressed-tensors", "--bits", 2)
    found = results(loftq, *model, *asked)
    assert found["settings"]["packed"] is False
    assert found["ranks"][0]["memory"] == plain
    done = loftq("sweep-ranks", *model, *asked, "--vram", "16GB")
    assert done.code == 4
    assert "or --container gptq" in done.err
    done = loftq("sweep-ranks", *model, "--container", "gptq", "--bits", 3, "--vram", "3GB")
    assert "or --bits 2" in done.err


def test_errors_of_outputs_are_those_of_qera(loftq: Loftq, tiny: Path, tmp_path: Path) -> None:
    """By rank what `quantize --init qera` reports of the same text, from one decomposition."""
    text = tmp_path / "text.txt"
    text.write_text((DEMO_DIRECTORY / "heldout.txt").read_text()[:12_000])
    argv = ("-m", tiny, "--error", "--ranks", "2,8", "--calibration-text", text, "--bits", 2)
    found = results(loftq, *argv)
    assert found["settings"]["calibration"]["tokens"] % 32 == 0
    assert len(found["settings"]["calibration"]["sha256"]) == 64
    plain = found["quantized_only_output_error_relative"]
    low, high = found["ranks"]
    assert plain > low["output_error_relative"] > high["output_error_relative"] > 0
    assert high["output_error_removed"] == pytest.approx(1 - high["output_error_relative"] / plain)
    assert "the output error falls from" in found["verdict"]["sentence"]
    outcome = loftq("quantize", "-m", tiny, "-o", tmp_path / "out", "--rank", 8, "--init", "qera",
                    "--bits", 2, "--calibration-text", text, "--json")  # fmt: skip
    assert outcome.code == 0, outcome.err
    totals = json.loads(outcome.out)["results"]["totals"]
    assert totals["output_error_relative"] == pytest.approx(high["output_error_relative"], rel=2e-3)
    key = "quantized_only_output_error_relative"
    assert totals[key] == pytest.approx(found[key], rel=1e-4)


def test_progress_names_the_layers(loftq: Loftq) -> None:
    outcome = loftq("sweep-ranks", "--error", "--ranks", 4)
    assert "measuring: 16/16" in outcome.err
    assert "transformer.h.3.mlp.c_proj" in outcome.err


def test_the_error_of_a_model_without_weights(
    loftq: Loftq, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    outcome = loftq("sweep-ranks", "-m", "gpt2", "--error")
    assert (outcome.code, outcome.out) == (1, "")
    assert "error: there are no weights of 'gpt2' here to measure" in outcome.err
    assert "hint: leave --error out" in outcome.err


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--ranks", "4,x"], 2, "--ranks takes whole numbers from 1"),
        (["--ranks", "0"], 2, "--ranks takes whole numbers from 1"),
        (["--vram", "24"], 2, "--vram takes a size such as 24GB"),
        (["--vram", "0GB"], 2, "--vram takes a size such as 24GB"),
        (["--bits", "5"], 2, "--bits"),
        (["--bits", "3", "--quant-type", "fp4"], 2, "fp4 has 4 bits only"),
        (["--calibration-text", "x"], 2, "--calibration-text has no effect without --error"),
        (["--error", "--calibration-text", "./nowhere"], 1, "nowhere cannot be read"),
        (["--error", "--bits", "8", "--calibration-text", "x"], 2, "for 4 bits and fewer"),
        (["--batch-size", "0"], 2, "--batch-size"),
        (["--target-modules", "c_atn"], 1, "no layer is called 'c_atn'"),
        (["--target-modules", "wte"], 1, "'wte' is not a layer that can be adapted"),
        (["--block-size", "48"], 2, "no block size 48"),
        (["--container", "gptq", "--block-size", "256"], 2, "no block size 256 in gptq"),
        (["--container", "gptq", "--quant-type", "fp4"], 2, "gptq has no --quant-type"),
        (["--container", "gptq", "--bits", "16"], 2, "16 bits have no --container"),
        (["--container", "awq"], 2, "awq"),
        (["-m", "gpt2", "--container", "compressed-tensors"], 1, "does not fit into compressed"),
        (["-m", "gpt2", "--block-size", "4096"], 1, "block size 4096 does not fit"),
        (["-m", "falcon"], 1, "no layer of this model can be quantized"),
        (["-m", "./nowhere"], 1, "no model at './nowhere'"),
    ],
)
def test_bad_input(loftq: Loftq, argv: list[str], code: int, message: str) -> None:
    outcome = loftq("sweep-ranks", *argv)
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_16_bits_have_no_blocks_that_could_not_fit(loftq: Loftq) -> None:
    assert loftq("sweep-ranks", "-m", "gpt2", "--bits", 16, "--block-size", 4096).code == 2
    found = results(loftq, "-m", "gpt2", "--bits", 16)
    assert found["settings"]["block_size"] is None
    assert found["quantized_parameters"] == 0


def test_a_rank_that_quantize_would_refuse_is_counted_and_warned_of(loftq: Loftq) -> None:
    outcome = loftq("sweep-ranks", "--ranks", "300", "--error", "--json")
    document = json.loads(outcome.out)
    assert "a rank above 256 is more than transformer.h.0.attn.c_" in document["warnings"][0]
    # The full rank leaves nothing but rounding.
    assert document["results"]["ranks"][0]["weight_error_relative"] < 1e-4


def test_ranks_keep_their_order_and_lose_their_doubles(loftq: Loftq) -> None:
    found = results(loftq, "-m", "gpt2", "--ranks", "16, 4,16")
    assert [cost["rank"] for cost in found["ranks"]] == [16, 4]


# --- pipes --------------------------------------------------------------------------------------


def shell(line: str) -> subprocess.CompletedProcess[str]:
    loftq = f'loftq() {{ "{sys.executable}" -m loftq_cli "$@"; }}'
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {loftq}; {line}"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
        timeout=60,
    )


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_verdict_through_jq() -> None:
    done = shell("loftq sweep-ranks -m gpt2 --json | jq -r .results.verdict.sentence")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Rank ")
    assert done.stdout.endswith(".\n")


def test_head_is_no_error() -> None:
    done = shell("loftq sweep-ranks -m gpt2 | head -1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("rank\ttrainable_parameters\t")


def test_tsv_has_every_term() -> None:
    done = shell("loftq sweep-ranks -m gpt2 --ranks 8 --vram 24GB")
    header, record = (line.split("\t") for line in done.stdout.splitlines())
    row = dict(zip(header, record, strict=True))
    assert row["trainable_parameters"] == "1179648"
    assert row["fits"] == "true"
    assert row["weight_error_relative"] == ""
    assert int(row["memory_total_bytes"]) > int(row["memory_weights_bytes"]) > 0
