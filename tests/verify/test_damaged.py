"""Every kind of damage is found, with exit 3 and the first layer or file that differs."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq_cli.checkpoint.safetensors import read_header
from tests.battery import BATTERY
from tests.verify.conftest import (
    LAYER,
    Loftq,
    edit_json,
    edit_report,
    overwrite,
    reseal,
    run_verify,
    statuses,
)

WEIGHTS = "model.safetensors"
ADAPTER = "loftq_init/adapter_model.safetensors"
ADAPTER_CONFIG = "loftq_init/adapter_config.json"
Damage = Callable[[Path], None]


def flip(piece: bytearray) -> None:
    piece[7] ^= 0x80


def other_scale(piece: bytearray) -> None:
    (absmax,) = struct.unpack_from("<f", piece)
    struct.pack_into("<f", piece, 0, 2 * absmax)


def flip_a_code(out: Path) -> None:
    overwrite(out / WEIGHTS, f"{LAYER}.weight", flip)


def double_an_absmax(out: Path) -> None:
    overwrite(out / WEIGHTS, f"{LAYER}.weight.absmax", other_scale)


def nan_absmax(out: Path) -> None:
    def change(piece: bytearray) -> None:
        struct.pack_into("<f", piece, 8, float("nan"))

    overwrite(out / WEIGHTS, f"{LAYER}.weight.absmax", change)


def nan_in_adapter(out: Path) -> None:
    def change(piece: bytearray) -> None:
        struct.pack_into("<f", piece, 8, float("inf"))

    overwrite(out / ADAPTER, f"base_model.model.{LAYER}.lora_B.weight", change)


def swap_a_and_b(out: Path) -> None:
    tensors = load_file(out / ADAPTER)
    a, b = (f"base_model.model.{LAYER}.lora_{which}.weight" for which in "AB")
    tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, out / ADAPTER, metadata={"format": "pt"})


def transpose_a_and_b(out: Path) -> None:
    """The same swap with shapes that fit: A is Bᵀ and B is Aᵀ."""
    tensors = load_file(out / ADAPTER)
    a, b = (f"base_model.model.{LAYER}.lora_{which}.weight" for which in "AB")
    tensors[a], tensors[b] = tensors[b].T.contiguous(), tensors[a].T.contiguous()
    save_file(tensors, out / ADAPTER, metadata={"format": "pt"})


def drop_an_adapter(out: Path) -> None:
    tensors = load_file(out / ADAPTER)
    del tensors[f"base_model.model.{LAYER}.lora_A.weight"]
    save_file(tensors, out / ADAPTER, metadata={"format": "pt"})


def one_adapter_too_many(out: Path) -> None:
    tensors = load_file(out / ADAPTER)
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(8, 64)
    save_file(tensors, out / ADAPTER, metadata={"format": "pt"})


def change_alpha(out: Path) -> None:
    edit_json(out / ADAPTER_CONFIG, lambda config: config.update(lora_alpha=16))


def alpha_for_one_layer(out: Path) -> None:
    edit_json(out / ADAPTER_CONFIG, lambda config: config.update(alpha_pattern={LAYER: 99}))


def other_targets(out: Path) -> None:
    edit_json(out / ADAPTER_CONFIG, lambda config: config["target_modules"].remove("q_proj"))


def empty_skip_list(out: Path) -> None:
    def change(config: Any) -> None:
        skipped = config["quantization_config"]["llm_int8_skip_modules"]
        skipped[:] = [name for name in skipped if not "lm_head".endswith(name)]

    edit_json(out / "config.json", change)


def skip_a_quantized_layer(out: Path) -> None:
    def change(config: Any) -> None:
        config["quantization_config"]["llm_int8_skip_modules"].append(LAYER)

    edit_json(out / "config.json", change)


def other_quant_type(out: Path) -> None:
    def change(config: Any) -> None:
        config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"

    edit_json(out / "config.json", change)


def hostile_shape(out: Path) -> None:
    """bitsandbytes would read far past the codes that are there."""

    def change(piece: bytearray) -> None:
        piece[:] = piece.replace(b"[64, 64]", b"[9e9,64]")

    overwrite(out / WEIGHTS, f"{LAYER}.weight.quant_state.bitsandbytes__nf4", change)


def other_levels(out: Path) -> None:
    overwrite(out / WEIGHTS, f"{LAYER}.weight.quant_map", other_scale)


def drop_from_report(out: Path) -> None:
    def change(results: Any) -> None:
        results["layers"] = [layer for layer in results["layers"] if layer["name"] != LAYER]

    edit_report(out, change)


def better_figure(out: Path) -> None:
    def change(results: Any) -> None:
        layer = next(layer for layer in results["layers"] if layer["name"] == LAYER)
        layer["weight_error_relative"] -= 0.001

    edit_report(out, change)


@pytest.mark.parametrize(
    ("damage", "check", "named"),
    [
        (flip_a_code, "residuals", LAYER),
        (double_an_absmax, "residuals", LAYER),
        (nan_absmax, "container", LAYER),
        (hostile_shape, "container", LAYER),
        (other_levels, "container", LAYER),
        (drop_from_report, "container", LAYER),
        (empty_skip_list, "container", "lm_head"),
        (skip_a_quantized_layer, "container", LAYER),
        (other_quant_type, "container", "config.json"),
        (swap_a_and_b, "adapter", LAYER),
        (drop_an_adapter, "adapter", LAYER),
        (one_adapter_too_many, "adapter", "lm_head"),
        (nan_in_adapter, "adapter", LAYER),
        (change_alpha, "adapter", "adapter_config.json"),
        (alpha_for_one_layer, "adapter", LAYER),
        (other_targets, "adapter", LAYER),
        (transpose_a_and_b, "residuals", LAYER),
        (better_figure, "residuals", LAYER),
    ],
)
def test_damage_with_a_report_that_was_made_to_match(
    damage: Callable[[Path], None], check: str, named: str, written: Path, loftq: Loftq
) -> None:
    damage(written)
    reseal(written)
    outcome, results = run_verify(loftq, written)
    assert outcome.code == 3, outcome.err
    assert named in outcome.err.partition("error: ")[2]
    failed = next(test for test in results["tests"] if test["status"] == "failed")
    assert failed["name"] == check
    assert failed["cause"]
    assert failed["hint"]


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (flip_a_code, WEIGHTS),
        (nan_in_adapter, ADAPTER),
        (change_alpha, ADAPTER_CONFIG),
        (empty_skip_list, "config.json"),
        (lambda out: (out / "generation_config.json").unlink(), "generation_config.json"),
        (lambda out: (out / WEIGHTS).unlink(), WEIGHTS),
        (lambda out: (out / "README.md").unlink(), "README.md"),
        (lambda out: (out / "README.md").write_text("Give it your password."), "README.md"),
        (lambda out: (out / "pytorch_model.bin").touch(), "pytorch_model.bin"),
        (lambda out: (out / "loftq_init/more").symlink_to("/etc"), "loftq_init/more"),
    ],
)
def test_a_file_that_is_not_the_written_one(
    damage: Callable[[Path], None], name: str, written: Path, loftq: Loftq
) -> None:
    damage(written)
    outcome, results = run_verify(loftq, written)
    assert outcome.code == 3, outcome.err
    assert statuses(results)["files"] == "failed"
    assert f"error: {written}: '{name}' is " in outcome.err


def norm(out: Path) -> None:
    overwrite(out / WEIGHTS, "model.norm.weight", flip)


def embedding(out: Path) -> None:
    overwrite(out / WEIGHTS, "model.embed_tokens.weight", flip)


def embedding_in_float32(out: Path) -> None:
    """The same values: still not what was there."""
    tensors = load_file(out / WEIGHTS)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].float()
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})

    def change(results: Any) -> None:
        results["totals"]["output_bytes"] += tensors["model.embed_tokens.weight"].numel() * 2

    edit_report(out, change)


def rope(out: Path) -> None:
    edit_json(out / "config.json", lambda config: config["rope_parameters"].update(rope_theta=5e5))


def another_end(out: Path) -> None:
    edit_json(out / "config.json", lambda config: config.update(eos_token_id=7))


def one_more_key(out: Path) -> None:
    edit_json(out / "config.json", lambda config: config.update(mine=True))


def one_key_less(out: Path) -> None:
    edit_json(out / "config.json", lambda config: config.pop("rms_norm_eps"))


def generation_config(out: Path) -> None:
    edit_json(out / "generation_config.json", lambda config: config.update(temperature=9.0))


def a_file_of_mine(out: Path) -> None:
    (out / "chat_template.jinja").write_text("{{ mine }}")
    entry = {"name": "chat_template.jinja", "bytes": 0, "sha256": ""}
    edit_report(out, lambda results: results["files"].append(entry))


def a_larger_source(out: Path) -> None:
    """All lists and shares of the report agree on it."""

    def change(results: Any) -> None:
        layers = [*results["layers"], *results["without_adapter"], *results["untouched"]]
        layers[0]["bytes"] += 1000
        results["totals"]["input_bytes"] += 1000
        for each in layers:
            each["share_of_bytes"] = each["bytes"] / results["totals"]["input_bytes"]

    edit_report(out, change)


def all_at_once(out: Path) -> None:
    """Each of them consistent with a report that was made anew."""
    for change in (norm, embedding, rope, generation_config):
        change(out)
    (out / "README.md").write_text("As good as new.")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (norm, "model.norm.weight"),
        (embedding, "model.embed_tokens.weight"),
        (embedding_in_float32, "model.embed_tokens.weight"),
        (rope, "rope_parameters.rope_theta"),
        (another_end, "eos_token_id"),
        (one_more_key, "mine"),
        (one_key_less, "rms_norm_eps"),
        (generation_config, "generation_config.json"),
        (a_file_of_mine, "chat_template.jinja"),
        (a_larger_source, "input_bytes"),
        (all_at_once, "rope_parameters.rope_theta"),
    ],
)
def test_what_was_only_copied_is_the_sources(
    damage: Callable[[Path], None], named: str, written: Path, loftq: Loftq
) -> None:
    damage(written)
    reseal(written)
    outcome, results = run_verify(loftq, written)
    assert outcome.code == 3, outcome.err
    first, *others = (test for test in results["tests"] if test["status"] == "failed")
    assert first["name"] == "copies"
    # Only an embedding in another dtype keeps the model from running.
    assert [test["name"] for test in others] == ["forward"] * (damage is embedding_in_float32)
    assert named in first["detail"] + first["cause"]


def test_copies_in_another_dtype(source: Path, tmp_path: Path, loftq: Loftq) -> None:
    out = tmp_path / "out"
    line = ("quantize", "-m", source, "-o", out, "--rank", 4, "--iterations", 1)
    assert loftq(*line, "--dtype", "float16").code == 0
    assert run_verify(loftq, out)[0].code == 0
    norm(out)
    reseal(out)
    outcome, results = run_verify(loftq, out)
    assert outcome.code == 3
    assert statuses(results)["copies"] == "failed"


@pytest.mark.parametrize("damaged", [True, False])
def test_files_that_this_peft_cannot_attach(
    damaged: bool, written: Path, loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    def refuse(*args: object, **options: object) -> None:
        raise NotImplementedError("no such layer here")

    monkeypatch.setattr(peft, "get_peft_model", refuse)
    edit_json(
        written / "loftq_report.json",
        lambda report: report["environment"]["packages"].update(peft="99.0"),
    )
    if damaged:
        flip_a_code(written)
    outcome, results = run_verify(loftq, written)
    assert outcome.code == 3
    failed = next(test for test in results["tests"] if test["name"] == "adapter")
    assert "no such layer here" in failed["cause"]
    if damaged:
        assert "copy it again" in failed["hint"]
    else:
        assert "as they were written, with peft 99.0 (here " in failed["hint"]
        assert "pip install -U transformers peft" in failed["hint"]


def stray_code(out: Path) -> None:
    """One weight gets the level that another code of the four bits has."""

    def change(piece: bytearray) -> None:
        piece[7] = piece[7] & 0xF0 | 1

    overwrite(out / WEIGHTS, f"{LAYER}.weight", change)


def fewer_bits_claimed(out: Path) -> None:
    def change(results: Any) -> None:
        other = next(each for each in results["layers"] if each["bits"] == 3)
        other["bits"] = 2

    edit_report(out, change)


def other_rank_pattern(out: Path) -> None:
    """With the alpha that keeps the scaling."""

    def change(config: Any) -> None:
        config["rank_pattern"][LAYER] = config["alpha_pattern"][LAYER] = 2

    edit_json(out / ADAPTER_CONFIG, change)


@pytest.mark.parametrize(
    ("damage", "check", "cause"),
    [
        (stray_code, "container", "code 1 is none of the 4 that 2 bits have"),
        (fewer_bits_claimed, "container", "is none of the 4 that 2 bits have"),
        (other_rank_pattern, "adapter", "has shape"),
    ],
)
def test_fewer_bits_and_their_damage(
    damage: Callable[[Path], None],
    check: str,
    cause: str,
    source: Path,
    tmp_path: Path,
    loftq: Loftq,
) -> None:
    """Three bits in the second block only, and two in the first, where the layer is."""
    out = tmp_path / "out"
    done = loftq("quantize", "-m", source, "-o", out, "--rank", 4, "--iterations", 1,
                 "--bits", "2x1,3")  # fmt: skip
    assert done.code == 0, done.err
    damage(out)
    reseal(out)
    outcome, results = run_verify(loftq, out)
    assert outcome.code == 3
    assert statuses(results)[check] == "failed"
    assert cause in next(test for test in results["tests"] if test["name"] == check)["cause"]


def a_weight_that_was_not_left_alone(out: Path) -> None:
    """The last bit of one weight: no residual that anyone would print shows it."""

    def change(piece: bytearray) -> None:
        piece[0] ^= 1

    overwrite(out / WEIGHTS, f"{LAYER}.weight", change)


def nan_weight(out: Path) -> None:
    def change(piece: bytearray) -> None:
        piece[2:4] = b"\xc0\x7f"  # bfloat16

    overwrite(out / WEIGHTS, f"{LAYER}.weight", change)


def quantization_config(out: Path) -> None:
    edit_json(
        out / "config.json",
        lambda config: config.update(quantization_config={"quant_method": "bitsandbytes"}),
    )


def b_that_is_not_zero(out: Path) -> None:
    def change(piece: bytearray) -> None:
        struct.pack_into("<f", piece, 8, 1e-12)

    overwrite(out / ADAPTER, f"base_model.model.{LAYER}.lora_B.weight", change)


@pytest.mark.parametrize(
    ("damage", "check", "named"),
    [
        (a_weight_that_was_not_left_alone, "residuals", LAYER),
        (nan_weight, "container", LAYER),
        (quantization_config, "container", "config.json"),
        (b_that_is_not_zero, "adapter", LAYER),
    ],
)
def test_nothing_is_quantized_and_nothing_else_was_changed(
    damage: Callable[[Path], None],
    check: str,
    named: str,
    source: Path,
    tmp_path: Path,
    loftq: Loftq,
) -> None:
    out = tmp_path / "out"
    done = loftq("quantize", "-m", source, "-o", out, "--rank", 4, "--init", "lora")
    assert done.code == 0, done.err
    damage(out)
    reseal(out)
    outcome, results = run_verify(loftq, out)
    assert outcome.code == 3
    assert statuses(results)[check] == "failed"
    assert named in next(test for test in results["tests"] if test["name"] == check)["detail"]


def test_padding_is_zero(source: Path, tmp_path: Path, loftq: Loftq) -> None:
    out = tmp_path / "out"
    done = loftq("quantize", "-m", source, "-o", out, "--rank", 4, "--iterations", 1,
                 "--rank-budget", "--uniform-rank", "--json")  # fmt: skip
    assert done.code == 0, done.err
    layers = json.loads(done.out)["results"]["layers"]
    padded = next(each for each in layers if each["stored_rank"])
    tensors = load_file(out / ADAPTER)
    B = tensors[f"base_model.model.{padded['name']}.lora_B.weight"]
    assert not B[:, padded["rank"] :].any()
    B[0, padded["rank"]] = 1e-9
    save_file(tensors, out / ADAPTER, metadata={"format": "pt"})
    reseal(out)
    outcome, results = run_verify(loftq, out)
    assert outcome.code == 3
    assert statuses(results)["adapter"] == "failed"
    assert f"not zero from column {padded['rank']} on" in outcome.err


@pytest.mark.parametrize(
    "name",
    ["weight_error_relative", "quantized_only_error_relative", "backbone_error_relative"],
)
def test_a_total_that_its_layers_do_not_have(
    name: str, written: Path, source: Path, loftq: Loftq
) -> None:
    """One that might be: only who measures the layers can tell."""

    def change(results: Any) -> None:
        results["totals"][name] += 5e-5

    edit_report(written, change)
    outcome, results = run_verify(loftq, written, "--source", source)
    assert outcome.code == 3
    failed = [name for name, status in statuses(results).items() if status == "failed"]
    assert failed == ["residuals"]
    assert "do not add up to the " in outcome.err


def test_what_a_layer_leaves_without_its_adapter(written: Path, source: Path, loftq: Loftq) -> None:
    def change(results: Any) -> None:
        results["layers"][0]["backbone_error_relative"] *= 1.01

    edit_report(written, change)
    outcome, results = run_verify(loftq, written, "--source", source)
    assert outcome.code == 3
    assert statuses(results)["residuals"] == "failed"
    assert "without its adapter, reported was" in outcome.err


@pytest.mark.parametrize(
    "name",
    [
        "weight_error_relative",
        "quantized_only_error_relative",
        "backbone_error_relative",
        "stored_bits",
        "information_bits",
        "input_bytes",
        "output_bytes",
        "adapter_bytes",
        "parameters",
        "trainable_parameters",
    ],
)
@pytest.mark.parametrize("less", [True, False])
def test_a_forged_total(name: str, less: bool, written: Path, source: Path, loftq: Loftq) -> None:
    def change(results: Any) -> None:
        value = results["totals"][name]
        results["totals"][name] = (
            value // 2
            if isinstance(value, int) and less
            else value * (2 - 1.5 * less if isinstance(value, float) else 2)
        )

    edit_report(written, change)
    source.rename(source.with_name("gone"))
    outcome, results = run_verify(loftq, written)
    assert outcome.code == 3
    assert [name for name, status in statuses(results).items() if status == "failed"] == ["totals"]
    assert f"the report's total {name}" in outcome.err or name == "input_bytes"


def list_another_shape(results: Any) -> None:
    results["untouched"][0]["shape"][0] += 1


def list_what_is_not_there(results: Any) -> None:
    results["untouched"][0]["name"] += "s"


def forget_a_tensor(results: Any) -> None:
    del results["untouched"][0]


def make_a_share_smaller(results: Any) -> None:
    results["layers"][0]["share_of_bytes"] /= 2


def name_another_class(results: Any) -> None:
    results["architecture"] = "MistralForCausalLM"


@pytest.mark.parametrize(
    "change",
    [
        list_another_shape,
        list_what_is_not_there,
        forget_a_tensor,
        make_a_share_smaller,
        name_another_class,
    ],
)
def test_a_list_that_is_not_that_of_the_files(
    change: Callable[[Any], None], written: Path, source: Path, loftq: Loftq
) -> None:
    edit_report(written, change)
    source.rename(source.with_name("gone"))
    outcome, results = run_verify(loftq, written)
    assert outcome.code == 3
    assert statuses(results)["totals"] == "failed"


def test_a_flipped_bit_is_found_by_hash_and_by_residual(written: Path, loftq: Loftq) -> None:
    flip_a_code(written)
    outcome, results = run_verify(loftq, written)
    assert outcome.code == 3
    status = statuses(results)
    assert [name for name in status if status[name] == "failed"] == ["files", "residuals"]
    assert [layer["name"] for layer in results["layers"] if not layer["agrees"]] == [LAYER]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_wrong_scale_in_every_format(
    bits: int, source: Path, tmp_path: Path, loftq: Loftq
) -> None:
    out = tmp_path / "out"
    options = ("--bits", bits, *(["--double-quant"] if bits == 4 else []))
    loftq("quantize", "-m", source, "-o", out, "--rank", 4, "--iterations", 1, *options)
    scale = f"{LAYER}.weight.nested_absmax" if bits == 4 else f"{LAYER}.SCB"
    overwrite(out / WEIGHTS, scale, other_scale)
    reseal(out)
    outcome, _ = run_verify(loftq, out)
    assert outcome.code == 3
    assert f"error: {out}: {LAYER} does not leave the residual" in outcome.err


def test_a_damaged_part_is_not_taken_for_another_source(written: Path, loftq: Loftq) -> None:
    """A hole in the file, as a bad disk leaves it: every layer of the first block is hit."""
    names = list(read_header(written / WEIGHTS).tensors)
    hit = [name for name in names if name.startswith("model.layers.0.") and "_proj" in name]
    for name in (name for name in hit if name.endswith(".weight")):
        overwrite(written / WEIGHTS, name, flip)
    reseal(written)
    outcome, results = run_verify(loftq, written)
    assert outcome.code == 3
    assert results["measured_layers"] == 14
    wrong = [layer["name"] for layer in results["layers"] if not layer["agrees"]]
    assert len(wrong) == 7
    assert f"error: {written}: {wrong[0]} does not leave the residual" in outcome.err
    assert "7 of 14 layers differ" in outcome.err


def test_code_of_the_checkpoint_is_not_run(written: Path, loftq: Loftq) -> None:
    edit_json(
        written / "config.json",
        lambda config: config.update(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
    )
    reseal(written)
    outcome, results = run_verify(loftq, written)
    assert outcome.code == 3
    assert statuses(results)["container"] == "failed"
    assert "--trust-remote-code" in outcome.err


@pytest.mark.parametrize("known", [True, False])
def test_another_source_is_called_that(
    known: bool, written: Path, tmp_path: Path, loftq: Loftq
) -> None:
    """A twin with the same files' sizes and headers, and one that lies in other files."""
    twin = BATTERY["llama"].build(seed=1, dtype=torch.bfloat16)
    twin.save_pretrained(tmp_path / "twin", max_shard_size="5GB" if known else "50KB")
    outcome, results = run_verify(loftq, written, "--source", tmp_path / "twin")
    assert outcome.code == 3
    assert f"error: {written}: {tmp_path / 'twin'} is not what was quantized" in outcome.err
    assert results["layers"][0]["name"] in outcome.err, "the first layer that differs"
    assert results["measured_layers"] == 5, "and no sea of them"


def test_a_source_of_another_shape(written: Path, loftq: Loftq) -> None:
    outcome, _ = run_verify(loftq, written, "--source", "demo")
    assert outcome.code == 3
    assert "demo is not what was quantized" in outcome.err
    assert "it has no weight for model.layers.0." in outcome.err


@pytest.mark.parametrize("name", ["../secret", "loftq_init/../../secret", "{absolute}", "./x", ""])
def test_a_hostile_report_leads_nowhere_else(
    name: str, written: Path, tmp_path: Path, loftq: Loftq, opened: list[str]
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    name = name.replace("{absolute}", str(secret))
    entry = {"name": name, "bytes": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
    edit_report(written, lambda results: results["files"].insert(0, entry))
    opened.clear()
    outcome, results = run_verify(loftq, written)
    assert outcome.code == 3
    assert statuses(results)["files"] == "failed"
    assert f"the report lists {name!r}" in outcome.err
    assert any(path.endswith("loftq_report.json") for path in opened)
    assert not any(path.endswith("secret") for path in opened)


def test_what_is_no_output_of_loftq(written: Path, source: Path, loftq: Loftq) -> None:
    report = written / "loftq_report.json"
    whole = json.loads(report.read_text())
    for directory, hint in (
        (source, "hf download ORG/NAME --local-dir DIR"),
        (source, f"loftq quantize -m {source} -o OUT"),
        (source / "nothing", "loftq quantize --output"),
        ("org/name", "hf download org/name --local-dir DIR && loftq verify DIR"),
        ("org/name@v1", "hf download org/name --revision v1 --local-dir DIR"),
    ):
        outcome = loftq("verify", directory)
        assert (outcome.code, outcome.out) == (1, "")
        assert f"{directory} is no output of loftq" in outcome.err
        assert hint in outcome.err.partition("hint: ")[2]
    settings, first = whole["results"]["settings"], whole["results"]["layers"][0]
    for text in (
        "",
        report.read_text()[:500],
        "[" * 100_000,
        json.dumps({**whole, "schema": "loftq/load"}),
        json.dumps({**whole, "results": {**whole["results"], "dry_run": True}}),
        json.dumps(
            {**whole, "results": {**whole["results"], "settings": {**settings, "block_size": 63}}}
        ),
        json.dumps({**whole, "results": {**whole["results"], "layers": [{**first, "bits": 5}]}}),
        json.dumps({**whole, "results": {**whole["results"], "layers": [{**first, "rank": 0}]}}),
        json.dumps(
            {**whole, "results": {**whole["results"], "layers": [{**first, "stored_rank": 1}]}}
        ),
    ):
        report.write_text(text)
        outcome = loftq("verify", written)
        assert (outcome.code, outcome.out) == (1, ""), outcome.err
        assert "error: " in outcome.err
        assert "cause: " in outcome.err


def test_a_source_that_is_not_on_this_disk(written: Path, loftq: Loftq) -> None:
    outcome = loftq("verify", written, "--source", "no-such-org/no-such-model")
    assert (outcome.code, outcome.out) == (1, "")
    assert "hint: hf download no-such-org/no-such-model" in outcome.err


def with_setting(file: str, key: str, value: object, inside: str | None = None) -> Damage:
    def change(content: Any) -> None:
        (content if inside is None else content[inside])[key] = value

    return lambda out: edit_json(out / file, change)


def put(name: str, content: bytes = b"{}") -> Damage:
    """A file, and a line for it in the report's list."""

    def change(out: Path) -> None:
        (out / name).write_bytes(content)
        edit_report(out, lambda results: results["files"].append({"name": name, "bytes": 0}))

    return change


def drop_the_tokenizer(out: Path) -> None:
    (out / "tokenizer.json").unlink()
    edit_report(
        out,
        lambda results: results.update(
            files=[file for file in results["files"] if file["name"] != "tokenizer.json"]
        ),
    )


@pytest.mark.parametrize(
    ("forge", "found"),
    [
        # What would have another model, or any library, loaded with the adapter.
        (with_setting(ADAPTER_CONFIG, "base_model_name_or_path", "/other"), "base_model_name"),
        (with_setting(ADAPTER_CONFIG, "auto_mapping", {"parent_library": "os"}), "auto_mapping"),
        (with_setting(ADAPTER_CONFIG, "parent_library", "os", "auto_mapping"), "auto_mapping"),
        (with_setting(ADAPTER_CONFIG, "loftq_base", "f" * 63, "auto_mapping"), "auto_mapping"),
        (with_setting(ADAPTER_CONFIG, "loftq_base", None, "auto_mapping"), "auto_mapping"),
        (with_setting(ADAPTER_CONFIG, "loftq_config", {"loftq_bits": 2}), "loftq_config"),
        (with_setting(ADAPTER_CONFIG, "unheard_of", 1), "unheard_of"),
        (
            with_setting("config.json", "bnb_4bit_compute_dtype", "int8", "quantization_config"),
            "bnb_4bit_compute_dtype is 'int8'",
        ),
        (
            with_setting(
                "config.json", "llm_int8_enable_fp32_cpu_offload", True, "quantization_config"
            ),
            "llm_int8_enable_fp32_cpu_offload",
        ),
        # What is not written for any source.
        (put("pytorch_model.bin"), "'pytorch_model.bin', which loftq does not write"),
        (put("adapter_config.json"), "'adapter_config.json', which loftq does not write"),
        (put("tf_model.h5"), "'tf_model.h5', which loftq does not write"),
        (put("loftq_init/more.json"), "'loftq_init/more.json', which loftq does not write"),
        # What the source has.
        (drop_the_tokenizer, "'tokenizer.json' is not the source's"),
    ],
)
def test_what_was_forged_with_its_report(
    forge: Damage, found: str, written: Path, source: Path, loftq: Loftq
) -> None:
    (source / "tokenizer.json").write_text("{}")
    put("tokenizer.json")(written)
    reseal(written)
    forge(written)
    reseal(written)
    outcome = loftq("verify", written)
    assert outcome.code == 3
    assert found in outcome.err
    assert "unexpected" not in outcome.err


@pytest.mark.parametrize("value", [-1.0, 0.0, 9.0, None])
@pytest.mark.parametrize("name", ["backbone_error_relative", "output_error_relative"])
def test_a_forged_error_of_all(name: str, value: float | None, written: Path, loftq: Loftq) -> None:
    true = json.loads((written / "loftq_report.json").read_text())["results"]["totals"][name]
    edit_report(written, lambda results: results["totals"].update({name: value}))
    outcome = loftq("verify", written)
    assert outcome.code == (0 if value == true else 3)


def test_a_file_that_has_grown_without_end(written: Path, source: Path, loftq: Loftq) -> None:
    """It is not read: that would take longer than anyone waits."""
    with (written / "generation_config.json").open("r+b") as file:
        file.truncate(1 << 40)
    assert "has 1,099,511,627,776 bytes" in loftq("verify", written).err


def test_files_that_transformers_will_not_load(written: Path, loftq: Loftq) -> None:
    edit_json(written / "config.json", lambda config: config.update(hidden_act="none such"))
    reseal(written)
    outcome = loftq("verify", written, "--source", "demo")
    assert outcome.code == 3
    assert "unexpected" not in outcome.err


@pytest.mark.parametrize("place", ["hub", "directory"])
def test_a_source_that_nothing_can_be_called(place: str, written: Path, loftq: Loftq) -> None:
    model = {"id": "a" if place == "hub" else "\0", "source": place, "revision": "\0"}
    edit_json(written / "loftq_report.json", lambda report: report.update(model=model))
    outcome = loftq("verify", written)
    assert outcome.code == 0, outcome.err
