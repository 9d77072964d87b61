"""`quantize --verify`: the finished directory is proved before the run calls itself done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loftq_cli.checkpoint.staging import Staging
from tests.verify.conftest import LAYER, Loftq, overwrite


def test_a_good_run_says_what_was_verified(source: Path, tmp_path: Path, loftq: Loftq) -> None:
    line = ("quantize", "-m", source, "-o", tmp_path / "out", "--rank", 4, "--iterations", 1,
            "--verify", "--json")  # fmt: skip
    first = loftq(*line)
    assert first.code == 0, first.err
    assert "verified: files, container, adapter, totals, residuals, copies, forward" in first.err
    assert json.loads(first.out)["schema"] == "loftq/quantize"
    again = loftq(*line, "--resume")
    assert again.code == 0, again.err
    assert "already complete" in again.err
    assert "verified: files" in again.err


def test_a_bad_disk_is_found(
    source: Path, tmp_path: Path, loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, commit = tmp_path / "out", Staging.commit

    def flip(piece: bytearray) -> None:
        piece[0] ^= 1

    def commit_and_rot(self: Staging) -> None:
        commit(self)
        overwrite(out / "model.safetensors", f"{LAYER}.weight", flip)

    monkeypatch.setattr(Staging, "commit", commit_and_rot)
    outcome = loftq("quantize", "-m", source, "-o", out, "--rank", 4, "--iterations", 1,
                    "--verify", "--json")  # fmt: skip
    assert outcome.code == 3
    assert json.loads(outcome.out)["schema"] == "loftq/quantize"
    assert f"error: {out}: 'model.safetensors' is not the file that was written" in outcome.err


def test_a_dry_run_has_nothing_to_verify(loftq: Loftq) -> None:
    outcome = loftq("quantize", "--dry-run", "--verify")
    assert (outcome.code, outcome.out) == (2, "")
