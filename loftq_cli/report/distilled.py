"""What a training of the adapters on the calibration text came to, in words."""

from __future__ import annotations

from collections.abc import Iterator

from loftq_cli.report import units
from loftq_cli.schema import Distillation, QuantizeResults


def change(run: Distillation) -> str:
    """`KL to the original 0.0455 → 0.0392 nats on the calibration text, in 300 steps`"""
    before, after = (units.small(value) for value in (run.kl_before, run.kl_after))
    if not _gained(run):
        return (
            f"KL to the original {before} nats on the calibration text, no nearer after "
            f"{units.plural(run.steps, 'step')}; the adapters are those before them"
        )
    return (
        f"KL to the original {before} → {after} nats on the calibration text, in "
        f"{units.plural(run.steps, 'step')}"
    )


def _gained(run: Distillation) -> bool:
    return run.kl_after < run.kl_before


def finding(results: QuantizeResults) -> Iterator[str]:
    if (run := results.distillation) is not None:
        yield f"distilling the adapters: {change(run)}; the codes stayed as they were"


def paragraph(results: QuantizeResults) -> Iterator[str]:
    """For a card."""
    if (run := results.distillation) is not None:
        if not _gained(run):
            yield (
                "Codes, scales and adapter are those of that start. Training the adapter to have "
                "the model predict what the original does (distillation) gained nothing: "
                f"{change(run)}."
            )
            return
        yield (
            f"Codes and scales are those of that start. The adapter was then trained for "
            f"{units.plural(run.steps, 'step')} of {run.batch} windows of {run.window_length} "
            "tokens to have the model predict what the original does (distillation): "
            f"{change(run)}. On text of another kind it may have gained less."
        )
