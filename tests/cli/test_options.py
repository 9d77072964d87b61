"""Options: spelled as in the contract, documented, completed, and understood."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from loftq_cli import cli
from loftq_cli.commands import spellings
from loftq_cli.errors import UsageError
from loftq_cli.options import items

SHARED = "--format --json --save --quiet -q --debug --help -h"
PAGE = "--html"  # of every command but report, whose --output may be a page
CONTRACT = {
    "quantize": "--model -m --output -o --bits --quant-type --block-size --double-quant --rank "
    "--iterations --init --lora-alpha --target-modules --device --seed --dry-run --resume --force "
    "--verify --max-memory --calibration-text --target-bits --rank-budget --uniform-rank "
    "--push-to-hub --private --quant-storage --adapter-dtype --experts --workers --stream "
    "--engine --ray-address --calibration-order --distill-steps",
    "load": "--model -m --device --dtype --expect --random-weights",
    "generate": "--model -m --prompt --prompts-file --max-new-tokens --temperature --top-p --seed "
    "--rank --adapter --device --dtype",
    "sweep-ranks": "--model -m --ranks --target-modules --bits --quant-type --block-size "
    "--batch-size --sequence-length --vram --error --device --container",
    "targets": "--model -m --rank --container",
    "compare": "--model -m --init --bits --container --experts --ranks --text --calibration-text "
    "--tasks --train-text --train-steps --learning-rate --seeds --quant-type --block-size "
    "--double-quant --iterations --lora-alpha --rslora --target-modules --device --dtype --seed "
    "--trust-remote-code",
    "check": "--model -m --device --dtype",
    "verify": "--source --sample --device",
    "export": "--container --output -o --resume --force --trust-remote-code",
    "merge": "--adapter --output -o --dtype --requantize --container --bits --block-size --resume "
    "--force --trust-remote-code",
    "push": "--private --force",
    "report": "--output -o",
}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(loftq: Callable[..., Any], command: str) -> None:
    done = loftq(command, "--help")
    assert (done.code, done.err) == (0, "")
    usage, _, first, *_ = done.out.splitlines()
    assert usage.startswith(f"Usage: loftq {command} [OPTIONS]")
    assert first.startswith(f"  loftq {command} "), "help starts with an example"
    for option in [*CONTRACT[command].split(), *SHARED.split(), *[PAGE] * (command != "report")]:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", done.out), option
    # Every option says what it does, not only what it is called.
    rows = re.split(r"\n  (?=-)", done.out.partition("\nOptions:")[2])[1:]
    for row in rows:
        _, _, text = row.replace("\n", "  ").partition("  ")
        assert len(text.split("[default")[0].split()) >= 3, row


def test_the_list_of_commands_is_the_table(loftq: Callable[..., Any]) -> None:
    listed = re.findall(r"^  (\S+)  +\S", loftq("--help").out.partition("Commands:")[2], re.M)
    assert [name for name in listed if name in cli.COMMANDS] == list(cli.COMMANDS)


def test_a_negated_flag_and_a_choice(loftq: Callable[..., Any]) -> None:
    done = loftq("quantize", "--bits", "5", "--output", "x")
    assert (done.code, done.out) == (2, "")
    assert "'5'" in done.err
    assert "--bits 2, 3, 4 or 8" in done.err


def complete(words: str, shell: str = "bash") -> list[str]:
    count = len(words.split(" ")) - 1
    done = subprocess.run(
        [sys.executable, "-m", "loftq_cli"],
        env=os.environ
        | {
            "_LOFTQ_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": words,
            "COMP_CWORD": str(count),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    return done.stdout.split()


def test_completion_of_commands_options_and_choices(tmp_path: Path) -> None:
    assert complete("loftq qu") == ["quantize"]
    assert complete("loftq load --dt") == ["--dtype"]
    assert complete("loftq load --dtype b") == ["bfloat16"]
    assert "demo" in complete("loftq load --model de")  # and directories, if there are any
    assert complete("loftq quantize --block-size 1") == ["128", "1024"]


def test_completion_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "model").mkdir(parents=True)
    (tmp_path / "hub" / "models--org--name").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert set(spellings._complete_model("")) == {"demo", "here/", "hub/", "org/name"}
    assert "./here/" in spellings._complete_model("./h")
    assert "here/model/" in spellings._complete_model("here/")
    assert f"{tmp_path}/here/" in spellings._complete_model(f"{tmp_path}/h")
    assert "demo" in spellings._complete_model("no/such/place")


def test_completion_installs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loftq_cli", "--install-completion", "bash"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env=os.environ
        | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    script = tmp_path / ".bash_completions" / "loftq.sh"
    assert "_LOFTQ_COMPLETE=complete_bash" in script.read_text("utf-8")
    assert str(script) in (tmp_path / ".bashrc").read_text("utf-8")


def test_lists() -> None:
    assert items("a, b", "--x") == ["a", "b"]
    for bad in ("", "a,,b", ","):
        with pytest.raises(UsageError, match="empty item"):
            items(bad, "--x")


def test_every_option_of_the_table_is_in_use() -> None:
    """One that no command uses would be an option nobody asked for."""
    group = typer.main.get_command(cli.app)
    commands = [group.get_command(None, name) for name in cli.COMMANDS]
    used = {parameter.name for command in commands for parameter in command.params}
    assert set(spellings.OPTIONS) - used == set()
