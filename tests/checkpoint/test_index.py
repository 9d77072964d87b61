"""Model directories: the layouts that are read, and those that are refused with a reason."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import LEAST, STRICTER, entry, file_bytes
from safetensors.torch import load_file, save_file

from loftq_cli.checkpoint.index import INDEX_FILE, SINGLE_FILE, load_json, open_checkpoint
from loftq_cli.checkpoint.safetensors import read_tensor
from loftq_cli.errors import CorruptCheckpoint, LoftqError, ModelNotFound, UnsafeCheckpoint

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_shards(directory: Path) -> dict[str, str]:
    """Two shards with the tensors a, b and c; the weight map that describes them."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, directory / SHARDS[0])
    save_file({"c": torch.ones(1, 4)}, directory / SHARDS[1])
    return {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(directory: Path, kind: type[LoftqError]) -> LoftqError:
    with pytest.raises(kind) as caught:
        open_checkpoint(directory)
    assert caught.value.hint
    return caught.value


def test_single_file(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(LEAST)
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.headers) == [SINGLE_FILE]
    assert list(checkpoint.tensors) == ["a"]
    assert checkpoint.total_bytes == len(LEAST)
    assert bytes(read_tensor(*checkpoint.tensors["a"])) == b"ab"


def test_shards(tmp_path: Path) -> None:
    write_index(tmp_path, write_shards(tmp_path))
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.headers) == list(SHARDS)
    assert list(checkpoint.headers) == list(SHARDS)
    assert checkpoint.tensors.keys() == {"a", "b", "c"}
    header, info = checkpoint.tensors["c"]
    assert header.path.name == SHARDS[1]
    assert bytes(read_tensor(header, info)) == torch.ones(4).numpy().tobytes()


def test_the_single_file_goes_first_as_in_transformers(tmp_path: Path) -> None:
    write_index(tmp_path, write_shards(tmp_path))
    (tmp_path / SINGLE_FILE).write_bytes(LEAST)
    assert list(open_checkpoint(tmp_path).headers) == [SINGLE_FILE]


def test_hub_cache_of_links(tmp_path: Path) -> None:
    """As huggingface_hub lays it out: every file is a link into ../../blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    weight_map = write_shards(blobs)
    write_index(blobs, weight_map)
    snapshot.mkdir(parents=True)
    for file in list(blobs.iterdir()):
        blob = file.rename(blobs / f"{hash(file.name) & 0xFFFFFFFF:08x}")
        (snapshot / file.name).symlink_to(Path("../../blobs", blob.name))
    assert open_checkpoint(snapshot).tensors.keys() == weight_map.keys()


def test_consolidated_copies_beside_the_index_do_not_count(tmp_path: Path) -> None:
    write_index(tmp_path, write_shards(tmp_path))
    (tmp_path / "consolidated.safetensors").write_bytes(b"not even sound")
    assert len(open_checkpoint(tmp_path).headers) == 2


def test_one_file_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "weights.fp16.safetensors").write_bytes(LEAST)
    (tmp_path / "adapter_model.safetensors").write_bytes(LEAST)
    assert list(open_checkpoint(tmp_path).headers) == ["weights.fp16.safetensors"]


@pytest.mark.parametrize(
    "file",
    [
        "../../etc/hostname",
        "/etc/passwd",
        "m/../../x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "..",
        "",
        ".safetensors",
        "x.bin",
        "x.safetensors\n",
        "x\0.safetensors",
        "x.safetensors/",
        "é.safetensors",
    ],
)
def test_names_that_lead_elsewhere(tmp_path: Path, file: str) -> None:
    write_index(tmp_path, {**write_shards(tmp_path), "c": file})
    error = refused(tmp_path, UnsafeCheckpoint)
    assert "'c'" in error.what
    assert error.what.isprintable()


@pytest.mark.parametrize("file", [None, 3, ["a.safetensors"], {}])
def test_names_that_are_no_names(tmp_path: Path, file: object) -> None:
    write_index(tmp_path, {**write_shards(tmp_path), "c": file})
    assert "'c'" in (refused(tmp_path, CorruptCheckpoint).cause or "")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 3])
def test_no_weight_map(tmp_path: Path, weight_map: object) -> None:
    write_shards(tmp_path)
    write_index(tmp_path, weight_map)
    assert "weight_map" in (refused(tmp_path, CorruptCheckpoint).cause or "")


def test_missing_shards_are_named_and_counted(tmp_path: Path) -> None:
    write_index(tmp_path, write_shards(tmp_path))
    for shard in SHARDS:
        (tmp_path / shard).unlink()
    error = refused(tmp_path, CorruptCheckpoint)
    assert SHARDS[0] in error.what
    assert "2 of the 2" in (error.cause or "")


def test_a_link_whose_blob_is_gone_is_a_missing_shard(tmp_path: Path) -> None:
    write_index(tmp_path, write_shards(tmp_path))
    (tmp_path / SHARDS[1]).unlink()
    (tmp_path / SHARDS[1]).symlink_to("../blobs/gone")
    assert "1 of the 2" in (refused(tmp_path, CorruptCheckpoint).cause or "")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"d": SHARDS[0]}, "'d' is not in the file that the index names"),
        ({"c": SHARDS[0]}, "'c' is not in the file that the index names"),
        ({"a": None}, "'a' is in a file that the index does not name"),
    ],
)
def test_index_and_headers_must_agree(
    tmp_path: Path, change: dict[str, str | None], expected: str
) -> None:
    weight_map = {**write_shards(tmp_path), **change}
    write_index(tmp_path, {name: file for name, file in weight_map.items() if file})
    assert expected in (refused(tmp_path, CorruptCheckpoint).cause or "")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    save_file({"c": torch.ones(1, 4), "a": torch.zeros(2)}, tmp_path / SHARDS[1])
    write_index(tmp_path, weight_map)
    assert "'a' is in a file" in (refused(tmp_path, CorruptCheckpoint).cause or "")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("[]", "not an object"),
        ('{"weight_map":{"a":"b","a":"c"}}', "twice"),
        ('{"weight_map":{},"weight_map":{}}', "twice"),
        ('{"a":"\\ud800"}', "surrogate"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "nested"),
        ("\ufeff{}", "JSON"),
        ('{"a":' + "1" * 5000 + "}", "digits"),
    ],
)
def test_broken_json(tmp_path: Path, text: str, cause: str) -> None:
    (tmp_path / INDEX_FILE).write_text(text, "utf-8")
    error = refused(tmp_path, CorruptCheckpoint)
    assert INDEX_FILE in error.what
    assert cause in (error.cause or "")


def test_json_of_configs(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, Infinity]}')
    assert load_json(path) == {"time_step_limit": [0.0, float("inf")]}
    with pytest.raises(CorruptCheckpoint) as caught:
        load_json(path, max_bytes=10)
    assert "10 is the limit" in (caught.value.cause or "")


def test_damaged_shard(tmp_path: Path) -> None:
    write_index(tmp_path, write_shards(tmp_path))
    shard = tmp_path / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert str(shard) in refused(tmp_path, CorruptCheckpoint).what


def test_weights_without_tensors(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(file_bytes("{}"))
    refused(tmp_path, CorruptCheckpoint)


def test_duplicate_tensor_in_one_file(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(STRICTER["tensor twice"][0])
    refused(tmp_path, CorruptCheckpoint)


def test_shards_without_their_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    assert INDEX_FILE in (refused(tmp_path, CorruptCheckpoint).cause or "")


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(LEAST)
    assert "base_model_name_or_path" in (refused(tmp_path, ModelNotFound).hint or "")


@pytest.mark.parametrize(
    "file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "x.pt", "x.pth", "x.ckpt"]
)
def test_pickle_is_never_opened(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    error = refused(tmp_path, UnsafeCheckpoint)
    assert file in error.what
    assert "save_pretrained" in (error.hint or "")


def test_no_model_at_all(tmp_path: Path) -> None:
    assert SINGLE_FILE in (refused(tmp_path, ModelNotFound).cause or "")
    refused_file = tmp_path / "file"
    refused_file.touch()
    with pytest.raises(ModelNotFound):
        open_checkpoint(refused_file)
    with pytest.raises(ModelNotFound):
        open_checkpoint(tmp_path / ("n" * 10_000))


def test_an_index_may_be_large_but_not_endless(tmp_path: Path) -> None:
    tensors = {f"t{i}": "model.safetensors" for i in range(50_000)}
    header = "{" + ",".join(f'"{name}":{entry(shape=[0], offsets=[0, 0])}' for name in tensors)
    (tmp_path / "weights.safetensors").write_bytes(file_bytes(header + "}"))
    write_index(tmp_path, dict.fromkeys(tensors, "weights.safetensors"))
    assert len(open_checkpoint(tmp_path).tensors) == 50_000


@pytest.mark.slow
def test_the_conversion_of_the_hint_works(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    source = tmp_path / "it's a model"
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=4, n_positions=8))
    model.save_pretrained(source)
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    (source / SINGLE_FILE).unlink()
    vocab = source / "vocab.json"
    vocab.write_text('{"a": 0, "b": 1, "<|endoftext|>": 2, "c": 3}')
    (source / "merges.txt").write_text("#version: 0.2\n")
    GPT2Tokenizer(str(vocab), str(source / "merges.txt")).save_pretrained(source)

    hint = refused(source, UnsafeCheckpoint).hint or ""
    command = shlex.split(hint.split("convert it: ")[1])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=300)
    converted = Path(f"{source}-safetensors")
    weights = load_file(converted / SINGLE_FILE)
    assert torch.equal(weights["transformer.wte.weight"], model.transformer.wte.weight)
    assert open_checkpoint(converted).tensors
    assert len(AutoTokenizer.from_pretrained(converted)) == 4
