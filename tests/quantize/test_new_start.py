"""A start is one function and one row of the table: everything else follows from them."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from loftq_cli.starts import STARTS, Start

FUNCTION = """
from loftq_cli.core.loftq import initialize


def sign(*, W, quantizer, rank, scaling, adapter_dtype, seed, times):
    assert times == 3
    given = {"scaling": scaling, "adapter_dtype": adapter_dtype, "seed": seed}
    return initialize(W, quantizer, rank, iterations=times, **given)
"""
SCRIPT = """
import sys
from loftq_cli import starts

starts.STARTS["sign"] = starts.Start(
    "sign", "Sign", "starts by a throw", "throws", "contributed:sign", {"times": 3},
    iterates=False, svd="own",
)
from loftq_cli.cli import main
from loftq_cli.options import CompareOptions
from loftq_cli.commands.compare_plan import methods, texts_of

asked = CompareOptions()
assert "sign" in [each.init for each in methods(asked, texts_of(asked))]
assert main(["quantize", "--help"]) == 0
assert main(["quantize", "--init", "sign", "--iterations", "2", "--dry-run"]) == 2
assert main(["quantize", "--init", "sign", "--dry-run", "--save", "dry"]) == 0
line = ["quantize", "--init", "sign", "--rank", "4", "--target-modules", "c_attn", "-o", "out"]
sys.exit(main([*line, "--quiet"]))
"""


def test_a_row_and_a_function_are_enough(tmp_path: Path) -> None:
    (tmp_path / "contributed.py").write_text(FUNCTION)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = ['', *{sys.path}]\n{SCRIPT}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "sign throws" in " ".join(done.stdout.split())
    assert "--init sign is one decomposition: no --iterations" in done.stderr
    assert json.loads(next((tmp_path / "dry").glob("*.json")).read_text())["results"]["totals"]
    assert "The adapter starts by a throw." in (tmp_path / "out" / "README.md").read_text()
    report = json.loads((tmp_path / "out" / "loftq_report.json").read_text())
    assert report["results"]["settings"]["init"] == "sign"
    assert {len(layer["error_curve"]) for layer in report["results"]["layers"]} == {3}
    totals = report["results"]["totals"]
    assert totals["weight_error_relative"] < totals["quantized_only_error_relative"]


@pytest.mark.parametrize(
    "start", [row for row in STARTS.values() if row.quantizes], ids=lambda row: row.name
)
def test_the_functions_take_what_the_rows_hand_over(start: Start) -> None:
    given = {"W", "quantizer", "rank", "scaling", "seed", *start.arguments}
    given |= {"input_moments"} if start.needs_moments else set()
    given |= {"iterations"} if start.iterates else set()
    given |= {"svd"} if start.svd != "own" else set()
    inspect.signature(start.load()).bind(**dict.fromkeys(given))
