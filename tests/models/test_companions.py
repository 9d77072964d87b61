"""Which files go with the weights: all small ones of the model, and nothing from elsewhere."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stand_in_hub import COMMIT, RemoteFile, StandInHub, running

from loftq_cli.errors import ModelNotFound
from loftq_cli.models import companions as rules
from loftq_cli.models import spec
from loftq_cli.models.companions import Companions, companions
from loftq_cli.models.spec import DEMO_DIRECTORY, resolve_model

# fmt: off
COPIED = (
    "LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md", "chat_template.jinja", "merges.txt",
    "generation_config.json", "preprocessor_config.json", "qwen.tiktoken", "spiece.model",
    "tokenizer.json", "vocab.bpe", "tekken.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "1_Pooling/config.json", "2_Dense/config.json",
    "2_Dense/model.safetensors", "additional_chat_templates/tool use.jinja", "docs/README.md",
    "speaker_embeddings/de.npy", "notes [old].txt", "模型说明.txt",
)
CODE = ("modeling_own.py", "tokenizer.py", "custom/kernel.cu", "custom/lib.so")
NEVER = (
    ".gitattributes", ".git/config", ".cache/huggingface/x.json", "__pycache__/m.cpython-312.pyc",
    "README.md", "readme.MD", "loftq_report.json", "loftq_init/adapter_config.json",
    "adapter_config.json", "adapter_model.safetensors", "consolidated.safetensors",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "tokenizer.bin", "tokenizer.safetensors",
    "vocab.pkl", "optimizer.pt", "tf_model.h5", "flax_model.msgpack", "m.gguf", "M.ONNX",
    "onnx/config.json", "openvino/openvino_model.xml", "checkpoint-500/config.json",
    "checkpoint-500/model.safetensors", "2_Dense/pytorch_model.bin", "extra/model.safetensors",
    "model.safetensors.index.fp16.json", "model-00001-of-00002.safetensors/x.txt",
)
# fmt: on
MODULES = [{"idx": n, "path": path} for n, path in enumerate(("", "1_Pooling", "2_Dense"))]


def put(directory: Path, name: str, text: str = "x") -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(MODULES) if name == "modules.json" else text)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """With a name that links must not confuse with that of its neighbours."""
    (tmp_path / "model").mkdir()
    put(tmp_path / "model", "config.json")
    put(tmp_path / "model", "model.safetensors")
    put(tmp_path / "model-2", "secret")
    return tmp_path / "model"


def look(directory: Path, *, with_code: bool = False) -> Companions:
    return companions(directory, with_code=with_code, weights=["model.safetensors"])


def names(found: Companions) -> list[str]:
    return [each.name for each in found.files]


def reasons(found: Companions) -> dict[str, str]:
    return {each.name: each.reason for each in found.left_out}


@pytest.mark.parametrize("with_code", [False, True])
def test_every_small_file_that_is_no_weight(source: Path, with_code: bool) -> None:
    for name in (*COPIED, *CODE, *NEVER):
        put(source, name)
    found = look(source, with_code=with_code)
    assert sorted(names(found)) == sorted([*COPIED, *(CODE if with_code else ())])
    # A folder stands for what is in it, and what the output is made from is not told of.
    left = [*NEVER, *(() if with_code else CODE)]
    told = reasons(found)
    assert all(any(f"{name}/".startswith(f"{each}/") for each in told) for name in left)
    assert all(any(f"{name}/".startswith(f"{each}/") for name in left) for each in told)
    assert not found.missed


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInHub]:
    from huggingface_hub import constants

    with running(StandInHub()) as hub:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


@pytest.mark.parametrize("with_code", [False, True])
def test_what_is_copied_is_fetched_and_nothing_else(with_code: bool, hub: StandInHub) -> None:
    weights = ("config.json", "model.safetensors")
    for name in (*COPIED, *CODE, *NEVER, *weights):
        text = json.dumps(MODULES) if name == "modules.json" else name
        hub.files[f"org/name/{name}"] = RemoteFile(text.encode())
    hub.files["org/name/train.jsonl"] = RemoteFile(b"much", total=rules.MOST_BYTES + 1)
    found = resolve_model("org/name", with_code=with_code)
    assert (found.identity.revision, found.directory.name) == (COMMIT, COMMIT)
    fetched = {
        path.relative_to(found.directory).as_posix()
        for path in found.directory.rglob("*")
        if path.is_file()
    }
    code = CODE if with_code else ()
    # Which folders are modules was not known yet: other folders' weights may come for nothing.
    assert fetched - {"extra/model.safetensors"} == {*COPIED, *code, *weights}
    beside = companions(
        found.directory,
        with_code=with_code,
        weights=["model.safetensors"],
        not_fetched=found.not_fetched,
    )
    assert sorted(names(beside)) == sorted([*COPIED, *code])
    assert reasons(beside)["pytorch_model.bin"] == rules.PICKLE
    assert [each.name for each in beside.missed] == ["train.jsonl"]
    assert "model.safetensors" not in reasons(beside)


def test_without_a_list_of_the_files_nothing_is_fetched_in_part(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that fails once must not make a model without its tokenizer."""

    def fail(*_: object) -> dict[str, int]:
        raise TimeoutError("the hub did not answer in time")

    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        hub.files[f"org/name/{name}"] = RemoteFile(name.encode())
    with monkeypatch.context() as patch:
        patch.setattr(spec, "_files_of", fail)
        with pytest.raises(ModelNotFound) as caught:
            resolve_model("org/name")
    assert caught.value.cause == "TimeoutError: the hub did not answer in time"
    resolve_model("org/name")
    monkeypatch.setattr(spec, "_files_of", fail)
    found = resolve_model("org/name")  # from the cache
    assert (found.directory / "tokenizer.json").is_file()


def test_links_are_followed_inside_of_the_model_only(source: Path) -> None:
    put(source, "real/LICENSE", "mine")
    put(source, ".git/config", "token")
    outside = {
        "absolute": "/etc/hostname",
        "relative": "../model-2/secret",
        "neighbour": str(source.with_name("model-2") / "secret"),
        "dots": "real/../../model-2/secret",
        "chain": "absolute",
        "folder": "/etc",
        "parent": "..",
        "through a folder": "folder/hostname",
        "hidden": ".git/config",
        "device": "/dev/zero",
        "process": "/proc/self/environ",
    }
    inside = {
        "link": "real/LICENSE",
        "link of a link": "link",
        "long way": "../model/real/LICENSE",
        "rooted": str(source / "real/LICENSE"),
    }
    nowhere = {"dangling": "nothing", "circle": "circle", "real/up": ".."}
    for name, target in {**outside, **inside, **nowhere, "other": "real"}.items():
        (source / name).symlink_to(target)
    found = look(source)
    assert sorted(names(found)) == sorted([*inside, "other/LICENSE", "real/LICENSE"])
    assert {each.path.read_text() for each in found.files} == {"mine"}
    told = reasons(found)
    assert {told[name] for name in outside} == {rules.OUTWARD_LINK}
    assert {told[name] for name in nowhere} == {rules.NOWHERE}
    assert {each.name for each in found.missed} >= {*outside, *nowhere}


def test_the_source_may_be_a_link_itself(source: Path) -> None:
    put(source, "1_Pooling/config.json")
    link = source.with_name("link")
    link.symlink_to(source)
    assert names(look(link)) == ["1_Pooling/config.json"]


def test_in_the_hubs_cache_files_are_links_to_its_blobs(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    snapshot, other = cache / "snapshots" / "abc", cache / "snapshots" / "def"
    for place in (snapshot / "1_Pooling", other):
        place.mkdir(parents=True)
    put(cache, "blobs/1", "blob")
    put(cache, "refs/main", "abc")
    put(tmp_path, "models--org--private/blobs/2", "theirs")
    for name, target in {
        "tokenizer.json": "../../blobs/1",
        "1_Pooling/config.json": "../../../blobs/1",
        "vocab.txt": "../def/vocab.txt",
        "LICENSE": "../../../models--org--private/blobs/2",
        "NOTICE": "../../refs/main",
    }.items():
        (snapshot / name).symlink_to(target)
    (other / "vocab.txt").symlink_to("../../blobs/1")
    found = look(snapshot)
    assert names(found) == ["1_Pooling/config.json", "tokenizer.json", "vocab.txt"]
    assert reasons(found) == dict.fromkeys(["LICENSE", "NOTICE"], rules.OUTWARD_LINK)
    # The blobs may not be a link either, to all that this disk has.
    (cache / "blobs").rename(tmp_path / "elsewhere")
    (cache / "blobs").symlink_to(tmp_path / "elsewhere")
    assert names(look(snapshot)) == []


def test_what_is_no_file_is_not_opened(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(source / "tokenizer.json")
    monkeypatch.chdir(source)  # the path of a socket may not be long
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("vocab.json")
        found = look(source)
    assert names(found) == []
    assert reasons(found) == dict.fromkeys(["tokenizer.json", "vocab.json"], rules.SPECIAL)


def test_names_that_no_report_can_list(source: Path) -> None:
    odd = [b"bad\xff.txt", b"two\nlines", b"back\\slash", b"a" * 240, b"\x1b[31mred"]
    for name in odd:
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_text("x")
    folder = os.fsdecode(os.fsencode(source) + b"/dir\xff")
    os.mkdir(folder)  # noqa: PTH102
    Path(folder, "inside").write_text("x")
    found = look(source)
    assert names(found) == []
    assert set(reasons(found).values()) == {rules.ODD_NAME}
    assert len(found.left_out) == len(odd) + 1
    assert json.dumps(reasons(found), ensure_ascii=False).encode().isascii()
    assert all(name.isprintable() for name in reasons(found))


def test_how_much_is_copied(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with put(source, "data.parquet").open("wb") as file:
        file.truncate(rules.MOST_BYTES + 1)
    put(source, "/".join(["deep"] * 40) + "/file")
    assert list(reasons(look(source)).values()) == [rules.TOO_LARGE, rules.TOO_DEEP]
    monkeypatch.setattr(rules, "MOST_FILES", 3)
    for n in range(9):
        put(source, f"{n}.txt")
    found = look(source)
    assert names(found) == ["0.txt", "1.txt", "2.txt"]
    assert found.left_out[0].reason == rules.TOO_MANY
    assert found.left_out[-1].name == "…"
    assert len(found.left_out) == 4


def test_a_module_whose_weights_are_a_pickle_is_missed(source: Path) -> None:
    for name in ("modules.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin"):
        put(source, name)
    assert [each.name for each in look(source).missed] == ["2_Dense/pytorch_model.bin"]
    put(source, "2_Dense/model.safetensors")
    found = look(source)
    assert not found.missed
    assert "2_Dense/model.safetensors" in names(found)


@pytest.mark.parametrize(
    "modules", ["", "{}", "[1]", '[{"path": 3}]', '[{"path": "../x"}]', "[" * 9999]
)
def test_a_list_of_modules_that_is_none(source: Path, modules: str) -> None:
    put(source, "2_Dense/model.safetensors")
    (source / "modules.json").write_text(modules)
    assert names(look(source)) == ["modules.json"]


def test_empty_folders_and_the_built_in_model(source: Path) -> None:
    (source / "2_Normalize").mkdir()
    assert look(source).empty == ["2_Normalize"]
    assert not look(DEMO_DIRECTORY).left_out
    assert {each.name for each in look(DEMO_DIRECTORY).tokenizer} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_file_that_cannot_be_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(source, "tokenizer.json")

    def access(path: Any, mode: int) -> bool:
        return mode != os.R_OK

    monkeypatch.setattr(os, "access", access)
    assert [each.reason for each in look(source).missed] == [rules.UNREADABLE]
