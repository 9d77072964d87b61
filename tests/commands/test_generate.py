"""`loftq generate`: where prompts come from, how tokens are chosen, and with which adapter."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq_cli.models.spec import DEMO_DIRECTORY
from tests.battery import BATTERY
from tests.commands.conftest import piped
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]
Documents = Callable[..., dict[str, Any]]
Refused = Callable[..., str]

PROMPT = "def read_file(path):"
SHORT = ("--max-new-tokens", 8)


def texts(data: dict[str, Any]) -> list[str]:
    return [each["generated_text"] for each in data["results"]["generations"]]


def test_what_is_said_of_each_prompt(document: Documents) -> None:
    data = document("generate", "-p", PROMPT, "-p", "import", *SHORT)
    results = data["results"]
    first, second = results["generations"]
    assert (first["prompt"], second["prompt"]) == (PROMPT, "import")
    assert first["new_tokens"] == second["new_tokens"] == 8
    assert first["prompt_tokens"] > second["prompt_tokens"] > 0
    for each in (first, second):
        assert each["generated_text"]
        assert each["tokens_per_second"] == pytest.approx(8 / each["seconds"])
    assert results["average_seconds"] == pytest.approx((first["seconds"] + second["seconds"]) / 2)
    assert results["temperature"] is results["seed"] is results["adapter"] is None
    assert texts(document("generate", "-p", PROMPT, *SHORT)) == [first["generated_text"]]


# --- prompts ------------------------------------------------------------------------------------


def test_prompts_from_a_file_follow_those_given(tmp_path: Path, document: Documents) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfimport os\r\n\n   \ndef caf\xc3\xa9(\n")
    data = document("generate", "-p", "class", "--prompts-file", file, "--max-new-tokens", 2)
    prompts = [each["prompt"] for each in data["results"]["generations"]]
    assert prompts == ["class", "import os", "def café("]


@pytest.mark.parametrize("dash", [[], ["--prompts-file", "-"]])
def test_prompts_from_a_pipe(dash: list[str], tmp_path: Path, loftq: Loftq) -> None:
    with piped(b"import os\nfor x in\n", tmp_path):
        done = loftq("generate", *dash, "--max-new-tokens", 2)
    assert done.code == 0
    assert [line.split("\t")[0] for line in done.out.splitlines()[1:]] == ["import os", "for x in"]
    assert ("note: reading prompts from stdin" in done.err) == (not dash)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "there is no prompt in"),
        (b"caf\xe9\n", "cause: it is not UTF-8 at byte 3"),
        (None, "cause: No such file or directory"),
    ],
)
def test_a_file_without_prompts(
    content: bytes | None, message: str, tmp_path: Path, refused: Refused
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    assert message in refused("generate", "--prompts-file", file, code=2)


def test_no_prompt_at_all(tmp_path: Path, refused: Refused) -> None:
    with piped(b"", tmp_path):
        error = refused("generate", code=2)
    assert "error: nothing to continue" in error


def test_an_empty_prompt_begins_a_text(document: Documents) -> None:
    (generation,) = document("generate", "-p", "", *SHORT)["results"]["generations"]
    assert (generation["prompt_tokens"], generation["new_tokens"]) == (1, 8)


def test_a_prompt_may_look_like_an_option(document: Documents) -> None:
    (generation,) = document("generate", "-p", "--rank=", *SHORT)["results"]["generations"]
    assert generation["prompt"] == "--rank="


# --- how tokens are chosen ----------------------------------------------------------------------


def test_sampling_follows_its_seed(document: Documents) -> None:
    line = ("generate", "-p", PROMPT, "-p", PROMPT, "--temperature", 1.2, *SHORT)
    data = document(*line)
    first = texts(data)
    assert first[0] != first[1], "each prompt has a seed of its own"
    assert (data["results"]["temperature"], data["results"]["seed"]) == (1.2, 0)
    assert texts(document(*line, "--seed", 0)) == first
    other = texts(document(*line, "--seed", 1))
    assert other[0] == first[1], "prompt n starts from seed + n"
    assert other[1] not in first


def test_the_likeliest_tokens_alone_are_the_greedy_text(document: Documents) -> None:
    greedy = texts(document("generate", "-p", PROMPT, *SHORT))
    line = ("generate", "-p", PROMPT, "--temperature", 2, "--top-p", 1e-6, *SHORT)
    data = document(*line)
    assert texts(data) == greedy
    assert data["results"]["top_p"] == 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", 0.9], "error: --top-p has no effect here"),
        (["--seed", 3], "error: --seed has no effect here"),
        (["--temperature", 0], "error: --temperature 0 is not above 0"),
        (["--temperature", "nan"], "error: --temperature nan is not above 0"),
        (["--temperature", 1, "--top-p", 1.5], "error: --top-p 1.5 is not a share"),
        (["--rank", 4, "--adapter", "x"], "choose one"),
    ],
)
def test_what_contradicts_itself(options: list[object], message: str, refused: Refused) -> None:
    assert message in refused("generate", "-p", PROMPT, *options, code=2)


def test_a_text_that_ends(demo: Path, document: Documents) -> None:
    """The end-of-text token is counted, and nothing comes after it."""
    (greedy,) = texts(document("generate", "-p", PROMPT, *SHORT))
    import transformers

    ids = transformers.AutoTokenizer.from_pretrained(demo)(greedy)["input_ids"]
    settings = json.loads((demo / "generation_config.json").read_text())
    settings |= {"eos_token_id": [ids[0], 0], "pad_token_id": None}
    (demo / "generation_config.json").write_text(json.dumps(settings))
    (generation,) = document("generate", "-m", demo, "-p", PROMPT)["results"]["generations"]
    assert generation["new_tokens"] == 1


# --- adapters -----------------------------------------------------------------------------------


def test_a_new_adapter_changes_no_text(loftq: Loftq, document: Documents) -> None:
    plain = texts(document("generate", "-p", PROMPT, *SHORT))
    done = loftq("generate", "-p", PROMPT, *SHORT, "--rank", 8, "--json")
    data = json.loads(done.out)
    assert texts(data) == plain
    assert data["results"]["adapter"] == "new, rank 8"
    assert "note: the new adapter starts at B = 0" in done.err


def test_a_quantized_directory_and_its_adapter(quantized: Path, document: Documents) -> None:
    line = ("generate", "-m", quantized, "-p", PROMPT, *SHORT)
    found = document(*line)
    assert found["results"]["adapter"] == "loftq_init"
    named = document(*line, "--adapter", quantized / "loftq_init")
    assert texts(named) == texts(found)
    assert named["results"]["adapter"] == str(quantized / "loftq_init")
    assert document(*line, "--rank", 4)["results"]["adapter"] == "new, rank 4"
    for dtype in ("float32", "float16"):  # not the one that the files are in
        assert len(texts(document(*line, "--dtype", dtype))[0]) > 4


def test_an_adapter_does_what_it_was_trained_to(
    quantized: Path, tmp_path: Path, document: Documents
) -> None:
    """One whose B is large writes other text: it is really in the way of the tokens."""
    trained = tmp_path / "trained"
    shutil.copytree(quantized / "loftq_init", trained)
    file = trained / "adapter_model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensors[name] = torch.randn(tensor.shape, generator=generator)
    save_file(tensors, file)
    line = ("generate", "-m", quantized, "-p", PROMPT, *SHORT)
    assert texts(document(*line, "--adapter", trained)) != texts(document(*line))


def test_an_adapter_that_is_none(quantized: Path, tmp_path: Path, refused: Refused) -> None:
    line = ("generate", "-p", PROMPT, "--adapter")
    assert "cause: there is no such directory" in refused(*line, tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "cause: there is no adapter_config.json" in refused(*line, empty)
    shutil.copy(quantized / "loftq_init" / "adapter_config.json", empty)
    assert "cause: the adapter has a config, no weights" in refused(*line, empty)
    (empty / "adapter_model.bin").write_bytes(b"pickle")
    assert "has its adapter as a pickle only" in refused(*line, empty)


@pytest.mark.parametrize("lost", ["all", "config", "link"])
def test_an_adapter_that_was_lost(
    lost: str, quantized: Path, tmp_path: Path, refused: Refused, document: Documents
) -> None:
    """The backbone without its adapter is another model: never in silence."""
    out = Path(shutil.copytree(quantized, tmp_path / "copy"))
    adapter = out / "loftq_init"
    if lost == "config":
        (adapter / "adapter_config.json").unlink()
    else:
        shutil.rmtree(adapter)
    if lost == "link":
        adapter.symlink_to(adapter)
    assert f"error: no adapter in {adapter}" in refused("generate", "-p", PROMPT, "-m", out)
    # Where another one is asked for, it is not needed.
    assert document("generate", "-m", out, "-p", PROMPT, *SHORT, "--rank", 1)


def test_an_adapter_of_another_shape(tmp_path: Path, loftq: Loftq, refused: Refused) -> None:
    BATTERY["gpt2"].build().save_pretrained(tmp_path / "other")
    out = tmp_path / "out"
    done = loftq("quantize", "-m", tmp_path / "other", "-o", out, "--rank", 4, "--iterations", 1)
    assert done.code == 0, done.err
    error = refused("generate", "-p", PROMPT, "--adapter", out / "loftq_init")
    assert "does not fit this model" in error
    assert "size mismatch" in error
    assert "base_model_name_or_path" in error


def test_an_adapter_of_another_base(quantized: Path, tmp_path: Path, refused: Refused) -> None:
    """Of the same shapes: nothing but what it says of its base tells it from the right one."""
    other = Path(shutil.copytree(quantized / "loftq_init", tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    config["auto_mapping"]["loftq_base"] = "0" * 64
    (other / "adapter_config.json").write_text(json.dumps(config))
    error = refused("generate", "-p", PROMPT, "-m", quantized, "--adapter", other)
    assert f"error: the adapter in {other} does not belong to this model" in error
    assert "cause: it was trained on another base: one of 000000000000…" in error


# --- models -------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context(loftq: Loftq, refused: Refused) -> None:
    error = refused("generate", "-p", "x = 1\n" * 200)
    assert "tokens is too long for this model" in error
    assert "cause: its context has 256 tokens" in error
    done = loftq("generate", "-p", "x y " * 125, "--json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    (generation,) = data["results"]["generations"]
    assert generation["prompt_tokens"] + generation["new_tokens"] == 256
    (warning,) = data["warnings"]
    assert warning.startswith(f"only {generation['new_tokens']} of 40 new tokens fit")


def test_a_model_that_writes_no_text(tmp_path: Path, refused: Refused) -> None:
    BATTERY["bert"].build().save_pretrained(tmp_path / "bert")
    error = refused("generate", "-m", tmp_path / "bert", "-p", "x")
    assert "error: BertForSequenceClassification does not generate text" in error


def test_a_model_without_a_tokenizer(tmp_path: Path, refused: Refused) -> None:
    BATTERY["gpt2"].build().save_pretrained(tmp_path / "gpt2")
    error = refused("generate", "-m", tmp_path / "gpt2", "-p", "x")
    assert "error: this model has no tokenizer" in error


def test_an_encoder_decoder_answers(tmp_path: Path, document: Documents) -> None:
    import transformers

    torch.manual_seed(0)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=4096,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
            eos_token_id=None,
        )
    )
    t5.save_pretrained(tmp_path / "t5")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DIRECTORY / name, tmp_path / "t5")
    line = ("generate", "-m", tmp_path / "t5", "-p", "x = 1\n" * 200, *SHORT)
    (generation,) = document(*line)["results"]["generations"]
    assert generation["new_tokens"] == 8
    assert generation["prompt_tokens"] > 256, "its positions are relative: nothing is too long"


# --- what reaches the terminal ------------------------------------------------------------------


def test_only_ours_is_on_stderr(quantized: Path) -> None:
    """No library speaks up, not even about 4-bit kernels that could be installed."""
    line = [sys.executable, "-m", "loftq_cli", "generate", "-m", quantized, *map(str, SHORT)]
    done = subprocess.run(
        line, input="import os\n", capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("prompt\tgenerated_text\t")
    kinds = {line.partition(":")[0] for line in done.stderr.splitlines()}
    assert kinds == {"note", "generating"}


WATCHED = """
from loftq_cli.console import Console
import time
console = Console()
console.claim_stdout()
with console.growing_text() as tell:
    if tell is None:
        console.note("nobody watches")
    else:
        for word in ("first [red]", "second\\x1b[2J", "third\\n" * 50, "last"):
            tell(word)
            time.sleep(0.11)
        console.warn("careful")
console.write_result("result\\n")
"""


def test_text_shows_while_it_grows_and_is_gone_from_the_result() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", WATCHED],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "40"},
        text=True,
    ) as process:
        os.close(theirs)
        assert process.stdout is not None
        result = process.stdout.read()
        assert process.wait(timeout=60) == 0
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # Linux says EIO when the other side is closed
        pass
    os.close(ours)
    assert result == "result\n", "stdout carries the result and nothing else"
    screen = shown.decode()
    assert "first [red]" in screen, "no markup"
    assert "\x1b[2J" not in screen
    assert r"second\x1b[2J" in screen
    assert "warning:" in screen
    assert "careful" in screen
    assert screen.rstrip("\r\n\x1b[?25h").endswith("\x1b[2K"), "taken away at the end"


def test_nobody_watches_a_pipe() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], capture_output=True, text=True, check=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("result\n", "note: nobody watches\n")
