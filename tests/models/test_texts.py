"""Files that are no text to calibrate, train or evaluate with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loftq_cli.errors import InvalidSetting, LoftqError
from loftq_cli.models import texts
from loftq_cli.models.texts import read_text


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("é", encoding="utf-8-sig")
    assert read_text(tmp_path / "text") == "é"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"abc\xff", "is not a text file"),
        ("text".encode("utf-16"), "is not a text file"),
        (b"a\0b", "is not a text file"),
    ],
)
def test_no_text(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(InvalidSetting) as caught:
        read_text(tmp_path / "text")
    assert caught.value.what == f"{tmp_path / 'text'} {words}"


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(LoftqError, match="cannot be read"):
            read_text(path)


def test_what_never_ends_or_can_be_read_once_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InvalidSetting, match="is no regular file"):
            read_text(path)


def test_a_text_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MOST_BYTES", 2_000_000)
    with (tmp_path / "text").open("wb") as file:
        file.truncate(2_000_001)
    with pytest.raises(InvalidSetting) as caught:
        read_text(tmp_path / "text")
    assert caught.value.what == f"{tmp_path / 'text'} is larger than 2 MB"
    assert caught.value.hint.startswith(f"head -c 2MB {tmp_path / 'text'} | ")
