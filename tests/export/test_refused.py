"""What cannot be exported, with the reason, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.engines import rewriting
from tests.battery import BATTERY
from tests.export.conftest import Loftq, contents
from tests.verify.conftest import edit_json, edit_report, overwrite, reseal

LAYER = "model.layers.0.self_attn.q_proj"


def refused(loftq: Loftq, source: Path, out: Path, *more: object, code: int = 1) -> str:
    """The whole message of a run that writes nothing."""
    container = () if "--container" in more else ("--container", "compressed-tensors")
    before = sorted(out.parent.iterdir())
    done = loftq("export", source, "-o", out, *container, *more)
    assert (done.code, done.out) == (code, ""), done.err
    assert "Traceback" not in done.err
    assert sorted(out.parent.iterdir()) == before
    return done.err


def quantized(loftq: Loftq, source: Path, out: Path, *options: object) -> Path:
    done = loftq("quantize", "-m", source, "-o", out, "--rank", 4, *options)
    assert done.code == 0, done.err
    return out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--init", "qlora"), "nf4 levels in bitsandbytes, which would be rounded"),
        (("--init", "lora"), "weights in 16 bits, for plain LoRA"),
    ],
)
def test_a_directory_without_integers(
    loftq: Loftq, source: Path, options: tuple[object, ...], said: str, tmp_path: Path
) -> None:
    written = quantized(loftq, source, tmp_path / "written", *options)
    message = refused(loftq, written, tmp_path / "out")
    assert said in message
    assert f"hint: loftq quantize -m {source} --container compressed-tensors" in message


def test_what_is_no_output(loftq: Loftq, source: Path, tmp_path: Path) -> None:
    assert "is no output of loftq" in refused(loftq, source, tmp_path / "out")
    assert "is no output of loftq" in refused(loftq, tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize(
    ("container", "said"),
    [("gptq", "is in gptq already"), ("bitsandbytes", "bitsandbytes has no integer codes")],
)
def test_a_container_that_makes_no_sense(
    loftq: Loftq, original: Path, container: str, said: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert said in refused(loftq, original, out, "--container", container, code=2)


def test_onto_itself(loftq: Loftq, written: Path) -> None:
    before = contents(written)
    assert "already exists" in refused(loftq, written, written)
    for out in (written, written / "below"):
        assert "lies in the source" in refused(loftq, written, out, "--force", code=2)
    assert contents(written) == before


def test_layers_that_the_container_does_not_know(loftq: Loftq, tmp_path: Path) -> None:
    BATTERY["gpt2"].build().save_pretrained(tmp_path / "gpt2")
    written = quantized(loftq, tmp_path / "gpt2", tmp_path / "written", "--container", "gptq",
                        "--init", "qlora")  # fmt: skip
    message = refused(loftq, written, tmp_path / "out")
    assert "does not fit into compressed-tensors" in message
    assert "Conv1D" in message


def test_a_layer_in_a_dtype_that_no_tensor_could_tell(loftq: Loftq, tmp_path: Path) -> None:
    model = BATTERY["llama"].build(dtype=torch.bfloat16)
    layer = model.get_submodule(LAYER)
    layer.weight.data = layer.weight.data.float()
    model.save_pretrained(tmp_path / "source")
    written = quantized(loftq, tmp_path / "source", tmp_path / "written", "--init", "qlora",
                        "--container", "compressed-tensors")  # fmt: skip
    message = refused(loftq, written, tmp_path / "out", "--container", "gptq")
    assert f"{LAYER} does not fit into gptq" in message
    assert "computed in float32" in message


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


WEIGHTS = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (WEIGHTS, flip, "it has not the SHA-256"),
        (WEIGHTS, cut, "were written"),
        (WEIGHTS, Path.unlink, "it is missing"),
        ("config.json", append, "were written"),
        ("config.json", flip, "it has not the SHA-256"),
        ("model.safetensors.index.json", flip, "it has not the SHA-256"),
        ("tokenizer_config.json", flip, "it has not the SHA-256"),
        ("1_Pooling/config.json", flip, "it has not the SHA-256"),
        ("loftq_init/adapter_config.json", flip, "it has not the SHA-256"),
        ("loftq_init/adapter_model.safetensors", flip, "it has not the SHA-256"),
    ],
)
def test_a_file_that_is_not_the_one_of_the_report(
    loftq: Loftq,
    written: Path,
    name: str,
    damage: Callable[[Path], None],
    said: str,
    tmp_path: Path,
) -> None:
    damage(written / name)
    out = tmp_path / "out"
    done = loftq("export", written, "--container", "compressed-tensors", "-o", out)
    assert (done.code, done.out) == (1, "")
    assert f"{written / name} is not the file that was written" in done.err
    assert said in done.err
    assert not out.exists()


def test_a_file_that_changes_while_it_is_read(
    loftq: Loftq, written: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hashed = rewriting.hash_file

    def hash_and_touch(path: Path) -> Any:
        found = hashed(path)
        flip(path)
        return found

    monkeypatch.setattr(rewriting, "hash_file", hash_and_touch)
    message = refused(loftq, written, tmp_path / "out")
    assert "it changed after its header was read" in message


def change_scales(content: bytearray) -> None:
    content[:2] = b"\x00\x7c"  # infinity


def change_zeros(content: bytearray) -> None:
    content[0] ^= 1


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("scales", change_scales, "inf is among its scales"),
        ("qzeros", change_zeros, "another grid"),
        ("g_idx", change_zeros, "another order"),
    ],
)
def test_codes_that_the_other_container_could_not_hold(
    loftq: Loftq,
    written: Path,
    part: str,
    change: Callable[[bytearray], None],
    said: str,
    tmp_path: Path,
) -> None:
    """Even where the report was made to fit them."""
    overwrite(written / WEIGHTS, f"{LAYER}.{part}", change)
    reseal(written)
    out = tmp_path / "out"
    done = loftq("export", written, "--container", "compressed-tensors", "-o", out)
    assert (done.code, done.out) == (1, "")
    assert f"{LAYER} is not stored as loftq_report.json says" in done.err
    assert said in done.err
    assert not out.exists()


def outward(results: Any) -> None:
    results["files"].append({"name": "../secret", "bytes": 1, "sha256": "0"})


def unlisted(results: Any) -> None:
    results["files"] = [each for each in results["files"] if each["name"] != WEIGHTS]


def other_bits(results: Any) -> None:
    results["layers"][0]["bits"] = 3


def other_shape(results: Any) -> None:
    results["layers"][0]["shape"] = [64, 0]


def one_layer_less(results: Any) -> None:
    del results["layers"][0]


def no_such_format(results: Any) -> None:
    results["settings"]["block_size"] = 48


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (outward, "no plain name of a file"),
        (unlisted, "does not list it"),
        (other_bits, "no weight file has all tensors of 3 bits"),
        (other_shape, "4 bits of shape [64, 0] cannot be"),
        (one_layer_less, "it does not name it"),
        (no_such_format, "loftq writes no 4 bits in 'gptq'"),
    ],
)
def test_a_report_that_does_not_fit_its_files(
    loftq: Loftq, written: Path, change: Callable[[Any], None], said: str, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("x")
    edit_report(written, change)
    assert said in refused(loftq, written, tmp_path / "out")


def test_a_config_without_its_skip_list(loftq: Loftq, written: Path, tmp_path: Path) -> None:
    def change(config: Any) -> None:
        del config["quantization_config"]["modules_to_not_convert"]

    edit_json(written / "config.json", change)
    reseal(written)
    message = refused(loftq, written, tmp_path / "out")
    assert "no list called modules_to_not_convert" in message


def test_an_output_that_nobody_may_replace(loftq: Loftq, original: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "precious").mkdir(parents=True)
    assert "already exists" in refused(loftq, original, out)
    assert "was not written by loftq" in refused(loftq, original, out, "--force")
    assert "choose one" in refused(loftq, original, out, "--force", "--resume", code=2)
    shutil.rmtree(out)
    out.write_text(json.dumps({}))
    assert "is not a directory" in refused(loftq, original, out)
