"""The time that a run is told to take, from its plan alone."""

from __future__ import annotations

from typing import Any

import pytest

from loftq_cli.engines.estimates import seconds
from loftq_cli.engines.plan import Plan, PlannedLayer, Task
from loftq_cli.engines.settings import CalibrationText, Settings
from loftq_cli.models.layers import LinearLayer

LAYER = LinearLayer("h.0.up", "h.0.up.weight", 1024, 1024, False, "F32")


def estimate(init: str, bits: int, rank: int, **more: Any) -> float:
    settings = Settings(init=init, bits=bits, **more)
    return seconds(Plan(settings, (Task("model", (PlannedLayer(LAYER, bits, rank),)),)))


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_a_layer_without_an_adapter_is_searched_too(init: str) -> None:
    unsearched = estimate("qlora", 4, 0)
    assert estimate(init, 4, 0) > 5 * unsearched > 0
    assert estimate("loftq-plain", 4, 0) == unsearched
    assert estimate(init, 8, 0) == estimate("qlora", 8, 0)  # 8 bits search nothing


def test_more_work_takes_longer() -> None:
    assert estimate("loftq", 4, 0) < estimate("loftq", 4, 4) < estimate("loftq", 4, 64)
    assert estimate("lora", 16, 4) == 0


def test_every_pass_over_the_text_takes_its_time() -> None:
    few, many = (CalibrationText("", tokens) for tokens in (1000, 2000))
    none = estimate("calibrated", 4, 4)
    one = estimate("calibrated", 4, 4, calibration=few) - none
    assert estimate("calibrated", 4, 4, calibration=many) - none == pytest.approx(2 * one)
    more = estimate("calibrated", 4, 4, calibration=few, calibration_order="sequential") - none
    assert more == pytest.approx(6 * one)
    assert one > 0
