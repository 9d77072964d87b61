"""Which source answers: disk before cache, cache before table, table before hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loftq_cli.errors import ModelNotFound, UsageError
from loftq_cli.models.lookup import fetch_model, find_model
from loftq_cli.models.spec import DEMO_DIRECTORY, cached_model, is_offline

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


def silent(text: str) -> None:
    raise AssertionError(f"the network would be used: {text}")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "home"


def put_into_cache(home: Path, repository: str) -> Path:
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DEMO_DIRECTORY / name, snapshot / name)
    return snapshot


def test_demo_and_directories() -> None:
    assert find_model("demo", silent).identity.source == "demo"
    found = find_model(str(DEMO_DIRECTORY), silent)
    assert (found.identity.source, found.identity.revision) == ("directory", None)
    assert found.checkpoint is not None
    with pytest.raises(ModelNotFound):
        find_model("./nowhere", silent)
    with pytest.raises(UsageError):
        find_model("two@revisions@here", silent)


def test_a_known_model_needs_neither_files_nor_network() -> None:
    found = find_model("openai-community/gpt2", silent)
    assert (found.identity.id, found.identity.source) == ("openai-community/gpt2", "known")
    assert found.checkpoint is None
    assert "the published sizes of gpt2" in found.reason
    assert "default llama config" in find_model("llama", silent).reason


def test_the_cache_comes_before_the_table(home: Path) -> None:
    put_into_cache(home, "gpt2")
    found = find_model("gpt2", silent)
    assert (found.identity.source, found.identity.revision) == ("hub", COMMIT)
    assert found.outline.parameters == find_model("demo", silent).outline.parameters


def test_an_incomplete_snapshot_does_not_count(home: Path) -> None:
    (put_into_cache(home, "gpt2") / "model.safetensors").unlink()
    assert cached_model("gpt2", None) is None
    assert find_model("gpt2", silent).identity.source == "known"


def test_revisions_in_the_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = put_into_cache(home, "org/name")
    for revision in (None, COMMIT):
        found = cached_model("org/name", revision)
        assert found is not None
        assert found.directory == snapshot
    assert cached_model("org/name", "v2") is None
    assert cached_model("org/name", "../../../../demo") is None
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "elsewhere"))
    assert cached_model("org/name", None) is None


def test_a_revision_is_not_answered_from_the_table() -> None:
    with pytest.raises(ModelNotFound, match="'gpt2@v1' is not known without its files"):
        find_model("gpt2@v1", silent)


def test_unknown_and_offline() -> None:
    with pytest.raises(ModelNotFound) as caught:
        find_model("meta-llama/Llama-2-7b", silent)
    assert "HF_HUB_OFFLINE" in str(caught.value.cause)
    assert str(caught.value.hint).startswith("--model meta-llama/Llama-2-7b-hf, ")


def test_offline_is_what_huggingface_hub_takes_it_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, offline in (("1", True), ("yes", True), ("0", False), ("", False)):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        assert is_offline() is offline
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "TRUE")
    assert is_offline()


def test_weights_of_a_model_that_is_only_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match="no weights of 'gpt2'") as caught:
        fetch_model("gpt2")
    assert str(caught.value.hint).startswith("leave --error out")
    assert fetch_model("demo").checkpoint is not None
