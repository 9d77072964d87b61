"""README and the documents in `examples/`: their blocks run, their links lead somewhere.

A block of shell or Python is run as it stands, in the order of its document, unless the line before
it says why not (`<!-- not run: … -->`). Then at least its command lines are parsed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from loftq_cli import cli
from loftq_cli.starts import STARTS
from tests import reference

DOCUMENTS = [reference.README, *sorted(reference.REFERENCE.parent.glob("*.md"))]
_BLOCK = re.compile(r"(?:^<!-- not run: (.+?) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


class Block(NamedTuple):
    language: str
    text: str
    excuse: str | None


def blocks(document: Path) -> Iterator[Block]:
    for excuse, language, text in _BLOCK.findall(document.read_text("utf-8")):
        yield Block(language, text, excuse or None)


def by_name(document: Path) -> str:
    return document.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_blocks_run(document: Path, tmp_path: Path) -> None:
    told = [each for each in blocks(document) if each.language in ("sh", "python")]
    scripts = [each for each in told if not each.excuse]
    if document == reference.README:
        # The first block, which installs, is run where everything is installed anew.
        _, _, quantize = told[0].text.partition(" && ")
        scripts.insert(0, Block("sh", quantize, None))
    for block in scripts:
        shell = ["bash", "-euo", "pipefail", "-c"]
        run = [sys.executable, "-c"] if block.language == "python" else shell
        done = subprocess.run(
            [*run, block.text],
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block.text}\n{done.stderr}"
        if "loftq_cli" in block.text:  # from Python it prints nothing; transformers does
            assert done.stderr == "", block.text


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_blocks_that_are_not_run_have_options_that_exist(document: Path) -> None:
    group = typer.main.get_command(cli.app)
    for block in blocks(document):
        if block.language != "sh" or not block.excuse:
            continue
        for words in command_lines(block.text):
            if words[0] == "loftq" and len(words) > 1 and words[1] in cli.COMMANDS:
                above = typer.Context(group, info_name="loftq")
                command = group.get_command(above, words[1])  # type: ignore[attr-defined]
                command.make_context(words[1], words[2:], parent=above)
            elif words[:2] == ["python", "-m"] and words[2].startswith("tests."):
                check_options(Path(module_file(words[2])), words[3:])
            elif words[0] == "python" and words[1].startswith("examples/"):
                check_options(reference.ROOT / words[1], words[2:])


def command_lines(script: str) -> Iterator[list[str]]:
    """The words of each command of a script, continued lines joined, without comments."""
    for line in script.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "|"]:
            if word in ("|", "&&", ";"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def module_file(name: str) -> str:
    found = find_spec(name)
    assert found is not None, name
    assert found.origin is not None, name
    return found.origin.replace("__init__.py", "__main__.py")


def check_options(script: Path, words: list[str]) -> None:
    source = script.read_text("utf-8")
    # What a script hands on is for `loftq compare`.
    known = reference.help_of("compare") if "parse_known_args" in source else ""
    for word in words:
        if word.startswith("--"):
            assert f'"{word}"' in source or f" {word} " in known, f"{script.name} has no {word}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for path, heading in _LINK.findall(document.read_text("utf-8")):
        found = document.parent / path if path else document
        assert found.exists(), path
        if heading:
            lines = found.read_text("utf-8").splitlines()
            headings = [line.lstrip("# ") for line in lines if line.startswith("#")]
            assert heading in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-")
                               for each in headings], heading  # fmt: skip


def test_the_reference_is_that_of_the_command_line() -> None:
    hint = "python -m tests.reference"
    readme = reference.README.read_text("utf-8")
    assert reference.REFERENCE.read_text("utf-8") == reference.reference(), hint
    assert readme == reference.with_commands(readme), hint


def test_every_start_is_explained() -> None:
    guide = (reference.REFERENCE.parent / "GUIDE.md").read_text("utf-8")
    rows = re.findall(r"^\| (`[a-z-]+`(?:, `[a-z-]+`)*)", guide.partition("`--init`")[2], re.M)
    named = {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)}
    assert set(STARTS) <= named


def test_the_arithmetic_of_a_cluster_is_what_its_block_prints() -> None:
    document = reference.REFERENCE.parent / "CLUSTER.md"
    (block,) = (each for each in blocks(document) if each.language == "python")
    done = subprocess.run([sys.executable, "-c", block.text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stdout in document.read_text("utf-8"), done.stdout
