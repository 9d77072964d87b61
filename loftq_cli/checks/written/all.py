"""The five checks of a written directory, in the order in which a reader would lose trust."""

from __future__ import annotations

from functools import partial

from loftq_cli.checks.battery import Check
from loftq_cli.checks.written.adapter import adapter
from loftq_cli.checks.written.container import container
from loftq_cli.checks.written.directory import Claims, Written
from loftq_cli.checks.written.files import files
from loftq_cli.checks.written.forward import forward
from loftq_cli.checks.written.residuals import Residuals

_GROUP = "directory"
_QUANTIZED = (
    "opens every quantized layer and dequantizes it as the reference does, with no more codes than "
    "its bits; the config names its format and every layer that is left out"
)
_UNQUANTIZED = "nothing is quantized, and every layer of the report is there with finite weights"


def all_checks(written: Written, residuals: Residuals, memory_bytes: int | None) -> list[Check]:
    """Wrong files do not keep the others from running: they say what is wrong with them."""
    form = written.claims.container
    return [
        Check(
            "files",
            _GROUP,
            "every file is there with the size and hash of the report, and no other is",
            partial(files, written),
        ),
        Check(
            "container",
            _GROUP,
            f"{form.name} {_QUANTIZED}" if form.quantizes else _UNQUANTIZED,
            partial(container, written),
        ),
        Check(
            "adapter",
            _GROUP,
            "PEFT puts it on the reported layers in rank, shape and scaling, and it is finite",
            partial(adapter, written),
        ),
        Check(
            "residuals",
            _GROUP,
            "weight, backbone and adapter leave what the report says, measured again in float64",
            residuals.check,
            needs=("container", "adapter"),
        ),
        Check(
            "forward",
            _GROUP,
            "transformers and PEFT load it as its README says, and its outputs are finite",
            partial(forward, written, memory_bytes),
            needs=("container", "adapter"),
        ),
    ]


def count_steps(claims: Claims, measured_layers: int) -> int:
    """How often the checks tell their progress if none fails, their own ends included."""
    return len(claims.files) + len(claims.layers) + measured_layers + 5
