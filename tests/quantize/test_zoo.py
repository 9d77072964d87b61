"""Every architecture of the zoo: refused with a reason, or what the README's table says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import loftq_cli
from tests.zoo import ZOO
from tests.zoo.__main__ import row, rows_of
from tests.zoo.proof import outcome_of

README = Path(loftq_cli.__file__).parents[1] / "examples" / "RESULTS.md"
# A case of each way in which a model may be unlike what loads it, but for those that the card's
# tests and those of verify's forward have; all others are slow.
TELLING = {
    "Gemma 3n",  # a list where others have a number
    "DeepSeek-V3",  # PEFT moves targets onto the experts
    "Llama 4",  # the quantizer takes its experts apart
    "Mamba",  # reads weights itself, and PEFT refuses a layer
    "DistilBERT, classifier",  # two layers are the head
    "WavLM, CTC",  # gives a function its weights
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in TELLING else pytest.mark.slow) for name in ZOO]
)
def test_it_loads_as_the_card_says_or_is_refused(name: str, tmp_path: Path) -> None:
    outcome = outcome_of(name, tmp_path)
    assert not outcome.amiss
    # The errors are this machine's; all else is the same everywhere.
    columns = row(name, outcome).split(" | ")[:4]
    assert columns in [each.split(" | ")[:4] for each in rows_of(README)]


def test_the_table_has_every_architecture() -> None:
    assert [each.split(" | ")[0] for each in rows_of(README)] == [f"| {name}" for name in ZOO]
