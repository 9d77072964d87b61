"""What the tests of commands share: models made once, and lines that must succeed or fail."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from loftq_cli.checks import rates
from loftq_cli.models.spec import DEMO_DIRECTORY
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]


@pytest.fixture(autouse=True, scope="session")
def no_bars() -> None:
    """What `loftq` asks for by environment variables before it imports transformers."""
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def quantized(loftq: Loftq, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with a rank-8 adapter, as `quantize` writes it. Not to be changed."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    done = loftq("quantize", "--output", out, "--rank", 8, "--iterations", 1, "--quiet")
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of random weights with the built-in model's tokens. Not to be changed."""
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=64, n_positions=32, vocab_size=4096, bos_token_id=0,
        eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DIRECTORY / name, directory)
    return directory


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the built-in model, to be changed."""
    shutil.copytree(DEMO_DIRECTORY, tmp_path / "demo")
    return tmp_path / "demo"


@pytest.fixture
def document(loftq: Loftq) -> Callable[..., dict[str, Any]]:
    """Runs a line with --json that must succeed; gives the document."""

    def run(*argv: object) -> dict[str, Any]:
        done = loftq(*argv, "--json")
        assert done.code == 0, done.err
        data: dict[str, Any] = json.loads(done.out)
        return data

    return run


@pytest.fixture
def refused(loftq: Loftq) -> Callable[..., str]:
    """Runs a line that must fail without a result; gives what it says on stderr."""

    def run(*argv: object, code: int = 1) -> str:
        done = loftq(*argv)
        assert (done.code, done.out) == (code, ""), done.err
        assert "error: " in done.err
        assert "Traceback" not in done.err
        return done.err

    return run


@contextmanager
def piped(content: bytes, tmp_path: Path) -> Iterator[None]:
    """File descriptor 0 at a file with this content, as after `<`."""
    file = tmp_path / "stdin"
    file.write_bytes(content)
    saved = os.dup(0)
    opened = os.open(file, os.O_RDONLY)
    try:
        os.dup2(opened, 0)
        yield
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(opened)


@pytest.fixture(scope="session")
def checked(loftq: Loftq, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the two files of a `check` of the built-in model, and its stdout."""
    directory = tmp_path_factory.mktemp("checked")
    with pytest.MonkeyPatch.context() as patch:  # rates are said, however short they are measured
        patch.setattr(rates, "_SECONDS", 0.0)
        done = loftq("check", "--json", "--quiet", "--save", directory)
    assert done.code == 0, done.err
    assert done.err == ""
    (directory / "stdout").write_text(done.out)
    return directory
