"""The matrices of experts in words."""

from __future__ import annotations

from loftq_cli.report import units
from loftq_cli.schema import Experts


def told(experts: Experts) -> str:
    """`192 matrices, 94 % of the parameters: 57 GB → 15.3 GB`, and why some stay as they are."""
    share = units.percent(experts.share_of_parameters)
    matrices = "1 matrix" if experts.matrices == 1 else f"{units.number(experts.matrices)} matrices"
    about = f"{matrices} with {share} of the parameters"
    before, after = units.size(experts.input_bytes), units.size(experts.output_bytes)
    if experts.reason is None:
        return f"{about}, quantized: {before} → {after}"
    if not experts.quantized:
        return f"{about} stay as they are, {before}: {experts.reason}"
    left = units.number(experts.matrices - experts.quantized)
    return f"{about}: {before} → {after}; {left} of them stay as they are: {experts.reason}"
