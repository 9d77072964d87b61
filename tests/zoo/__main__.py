"""Every architecture of the zoo, a line each.

python -m tests.zoo
python -m tests.zoo "Llama 4" Mamba          # these
python -m tests.zoo --write examples/RESULTS.md   # all, as the table between its marks
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from tests.zoo import ZOO
from tests.zoo.proof import Outcome, outcome_of

BEGIN = "<!-- python -m tests.zoo --write examples/RESULTS.md -->\n"
END = "<!-- the end of it -->\n"
_TABLE = """\
<details>
<summary>{loaded} that load, and {refused} that are refused</summary>

| architecture | class | in 4 bits | adapters | off without | with |
|---|---|---:|---:|---:|---:|
{rows}
</details>
"""


def row(name: str, outcome: Outcome) -> str:
    """A line of the table."""
    begin = f"| {name} | {ZOO[name].model_class} |"
    if outcome.refused is not None:
        return f"{begin} refused: {outcome.refused} | | | |\n"
    errors = f"{outcome.without:.0%} | {outcome.together:.1%}"
    return f"{begin} {outcome.quantized} | {outcome.adapted} | {errors} |\n"


def rows_of(readme: Path) -> list[str]:
    """The lines of the table in a document."""
    section = readme.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
    _, *rows = (line for line in section.splitlines(keepends=True) if line.startswith("| "))
    return rows


def write(readme: Path, rows: list[str]) -> None:
    """Puts the table between the marks of a document."""
    before, _, rest = readme.read_text("utf-8").partition(BEGIN)
    refused = sum("refused: " in each for each in rows)
    table = _TABLE.format(loaded=len(rows) - refused, refused=refused, rows="".join(rows))
    readme.write_text(before + BEGIN + table + END + rest.partition(END)[2], "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of the zoo; all without")
    parser.add_argument("--write", type=Path, help="a document whose table is replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, amiss = [], 0
    for name in options.names or ZOO:
        with tempfile.TemporaryDirectory() as directory:
            outcome = outcome_of(name, Path(directory))
        rows.append(row(name, outcome))
        print(rows[-1], *(f"    {what}\n" for what in outcome.amiss), sep="", end="", flush=True)
        amiss += bool(outcome.amiss)
    if options.write is not None:
        write(options.write, rows)
    return int(amiss > 0)


if __name__ == "__main__":
    raise SystemExit(main())
