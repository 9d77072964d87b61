"""The matrices of experts in words."""

from __future__ import annotations

from loftq_cli.report import units
from loftq_cli.schema import ExpertAdapters, Experts


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


def adapters_told(adapters: ExpertAdapters, trainable: int) -> str:
    """`rank 8 on 96 matrices of experts, 12,345 parameters, 87 % of what is trained`, and errors.

    Gate and up of an expert are one matrix there.
    """
    share = units.percent(adapters.parameters / max(trainable, 1))
    count = units.plural(adapters.parameters, "parameter")
    text = f"rank {adapters.rank} on {units.number(adapters.experts)} matrices of experts, "
    text += f"{count}, {share} of what is trained"
    before, after = adapters.backbone_error_relative, adapters.weight_error_relative
    if before is None or after is None:
        return text
    return f"{text}; weight error {units.error_change(before, after)}"
