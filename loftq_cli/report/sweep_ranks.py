"""What each rank costs and buys, one row a rank, and the verdict."""

from __future__ import annotations

from typing import Any

from loftq_cli.report import units
from loftq_cli.report.formats import code_bits
from loftq_cli.report.parts import model_name
from loftq_cli.report.tables import Column, Facts, Section, Table, View
from loftq_cli.schema import CalibratedOn, Document, RankCost, SweepRanksResults

_YES, _CHECKPOINTED, _NO = "yes", "with gc", "no"
_STYLES = {_YES: "green", _CHECKPOINTED: "yellow", _NO: "red"}

_RECORD_KEYS = (
    "rank",
    "trainable_parameters",
    "total_parameters",
    "trainable_percent",
    "reduction_factor",
    "adapter_bytes",
    "fits",
    "fits_with_checkpointing",
    "weight_error_relative",
    "weight_error_removed",
    "output_error_relative",
    "output_error_removed",
)


def sweep_ranks_view(document: Document[SweepRanksResults]) -> View:
    results = document.results
    sections: list[Section] = [
        Facts(_facts(results)),
        _trained(results),
        *([] if results.quantized_only_error_relative is None else [_errors(results)]),
        _memory(results),
        Facts([("verdict", results.verdict.sentence)]),
    ]
    return View(f"Ranks for {model_name(document)}", sections, _records(results))


def _facts(results: SweepRanksResults) -> list[tuple[str, str]]:
    settings = results.settings
    modules = units.plural(results.modules, "module")
    quantized = units.percent(results.quantized_parameters / max(results.base_parameters, 1))
    held = "16 bits, none quantized"
    if results.quantized_parameters:
        form = f"int{settings.bits}"
        if settings.quant_type is not None:
            form = f"{settings.quant_type} in blocks of {settings.block_size}"
        # Memory is that of 4 bits, and the figures below say so.
        if settings.bits < code_bits(settings.quant_type or ""):
            form = (
                f"codes of {settings.bits} bits in the 4-bit container, which has no smaller ones "
                f"(blocks of {settings.block_size}),"
            )
        held = f"{form} for {quantized} of them, 16 bits for the rest"
    step = f"{settings.batch_size} × {units.number(settings.sequence_length)} tokens"
    facts = [
        ("parameters", f"{units.number(results.base_parameters)} ({results.architecture})"),
        ("held in", held),
        ("targets", f"{', '.join(settings.target_modules)}: {modules}"),
        ("training step", f"{step}; memory is an estimate"),
    ]
    for what, error in (
        ("weight error", results.quantized_only_error_relative),
        ("output error", results.quantized_only_output_error_relative),
    ):
        if error is not None:
            facts.append((what, f"{units.percent(error)} by plain quantization"))
    if settings.calibration is not None:
        facts.append(("calibration text", _calibration(settings.calibration)))
    return facts


def _calibration(calibration: CalibratedOn) -> str:
    size = f", {units.number(calibration.tokens)} tokens" if calibration.tokens else ""
    return (
        f"sha256 {calibration.sha256[:12]}{size}; output errors are of the correction that is "
        "best for outputs, weight errors of the one that is best for weights"
    )


def _trained(results: SweepRanksResults) -> Table:
    columns = [
        Column("rank", "rank"),
        Column("trainable_parameters", "trainable", show=units.number),
        Column("trainable_percent", "of all", show=lambda value: units.percent(value / 100)),
        Column("reduction_factor", "reduction", show=lambda value: f"{units.significant(value)} ×"),
        Column("adapter_bytes", "adapter", show=units.size),
    ]
    rows = [[getattr(cost, column.key) for column in columns] for cost in results.ranks]
    return Table("What is trained", columns, rows)


def _errors(results: SweepRanksResults) -> Table:
    columns = [Column("rank", "rank")]
    for what, plain in (
        ("weight", results.quantized_only_error_relative),
        ("output", results.quantized_only_output_error_relative),
    ):
        if plain is not None:
            columns += [
                Column(f"{what}_error_relative", f"{what} error", show=units.percent),
                Column(f"{what}_error_removed", "removed", show=units.percent),
            ]
    rows = [[getattr(cost, column.key) for column in columns] for cost in results.ranks]
    return Table("What is left of the quantization error", columns, rows)


def _memory(results: SweepRanksResults) -> Table:
    """The terms in groups: what the rank leaves as it is, and what it decides."""
    columns = [
        Column("rank", "rank"),
        Column("weights", "weights", show=units.size),
        Column("state", "adapter state", show=units.size),
        Column("activations", "activations", show=units.size),
        Column("other", "other", show=units.size),
        Column("total_bytes", "total", show=units.size),
        Column("total_with_checkpointing_bytes", "with gc", show=units.size),
    ]
    limit = results.settings.vram_bytes
    if limit is not None:
        columns.append(Column("fits", "fits", style=lambda value: _STYLES[value]))
    rows = []
    for cost in results.ranks:
        memory = cost.memory
        row: list[Any] = [
            cost.rank,
            memory.weights_bytes + memory.absmax_bytes + memory.unquantized_bytes,
            memory.adapter_bytes + memory.gradients_bytes + memory.optimizer_bytes,
            memory.activations_bytes,
            memory.logits_bytes + memory.workspace_bytes + memory.context_bytes,
            memory.total_bytes,
            memory.total_with_checkpointing_bytes,
        ]
        rows.append(row if limit is None else [*row, _fits(cost)])
    title = "Memory to fine-tune"
    if limit is not None:
        title += f" in {units.size(limit)}"
    return Table(f"{title} (gc: gradient checkpointing)", columns, rows)


def _fits(cost: RankCost) -> str:
    if cost.fits:
        return _YES
    return _CHECKPOINTED if cost.fits_with_checkpointing else _NO


def _records(results: SweepRanksResults) -> Table:
    """The same for pipes, with every term of the memory."""
    terms = list(type(results.ranks[0].memory).model_fields)
    rows = [
        [
            *(getattr(cost, key) for key in _RECORD_KEYS),
            *(getattr(cost.memory, term) for term in terms),
        ]
        for cost in results.ranks
    ]
    keys = [*_RECORD_KEYS, *(f"memory_{term}" for term in terms)]
    return Table("ranks", [Column(key, key) for key in keys], rows)
