"""What each rank costs and buys, one row a rank, and the verdict."""

from __future__ import annotations

from loftq_cli.formats import DEFAULT_CONTAINER
from loftq_cli.report import units
from loftq_cli.report.experts import told
from loftq_cli.report.formats import code_bits
from loftq_cli.report.parts import TOLD_BY, model_name
from loftq_cli.report.sparks import bar
from loftq_cli.report.stored_bits import called
from loftq_cli.report.tables import Column, Facts, Records, Section, Table, View, fields
from loftq_cli.schema import Document, MemoryEstimate, RankCost, SweepRanksResults

_STYLES = {"yes": "green", "with gc": "yellow", "no": "red"}


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
        if settings.container != DEFAULT_CONTAINER:
            form = called(form, settings.container, settings.block_size)
            if not settings.packed:
                form += ", dequantized to 16 bits to be trained,"
        elif settings.quant_type is not None:
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
        *([] if results.experts is None else [("experts", told(results.experts))]),
        ("told by", TOLD_BY[results.counted_by]),
        ("training step", f"{step}; memory is an estimate"),
    ]
    for what, error in (
        ("weight error", results.quantized_only_error_relative),
        ("output error", results.quantized_only_output_error_relative),
    ):
        if error is not None:
            facts.append((what, f"{units.percent(error)} by plain quantization"))
    calibration = settings.calibration
    if calibration is not None:
        size = f", {units.number(calibration.tokens)} tokens" if calibration.tokens else ""
        about = (
            f"sha256 {calibration.sha256[:12]}{size}; output errors are of the correction that is "
            "best for outputs, weight errors of the one that is best for weights"
        )
        facts.append(("calibration text", about))
    return facts


def _trained(results: SweepRanksResults) -> Table:
    columns = [
        Column("rank", "rank"),
        Column("trainable_parameters", "trainable", show=units.number),
        Column("trainable_percent", "of all", show=lambda value: units.percent(value / 100)),
        Column("reduction_factor", "reduction", show=lambda value: f"{units.significant(value)} ×"),
        Column("adapter_bytes", "adapter", show=units.size),
    ]
    return Table("What is trained", columns, results.ranks)


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
                Column(f"{what}_error_removed", "", "picture", bar),
            ]
    return Table("What is left of the quantization error", columns, results.ranks)


def _memory(results: SweepRanksResults) -> Table:
    """The terms in groups: what the rank leaves as it is, and what it decides."""
    columns = [
        Column("rank", "rank"),
        _held("weights", "weights", "absmax", "unquantized"),
        _held("adapter state", "adapter", "gradients", "optimizer"),
        _held("activations", "activations"),
        _held("other", "logits", "workspace", "context"),
        _held("total", "total"),
        _held("with gc", "total_with_checkpointing"),
    ]
    title = "Memory to fine-tune"
    limit = results.settings.vram_bytes
    if limit is not None:
        title += f" in {units.size(limit)}"
        columns.append(Column(_fits, "fits", style=lambda value: _STYLES[value]))
    return Table(f"{title} (gc: gradient checkpointing)", columns, results.ranks)


def _held(title: str, *terms: str) -> Column:
    """Bytes of these terms of a `MemoryEstimate` together."""

    def of(cost: RankCost) -> int:
        return sum(getattr(cost.memory, f"{term}_bytes") for term in terms)

    return Column(of, title, show=units.size)


def _fits(cost: RankCost) -> str:
    if cost.fits:
        return "yes"
    return "with gc" if cost.fits_with_checkpointing else "no"


def _records(results: SweepRanksResults) -> Records:
    """The same for pipes, with every term of the memory."""
    keys = [key for key in RankCost.model_fields if key != "memory"]
    terms = list(MemoryEstimate.model_fields)
    memory = fields((cost.memory for cost in results.ranks), terms)
    rows = [[*cost, *held] for cost, held in zip(fields(results.ranks, keys), memory, strict=True)]
    return Records([*keys, *(f"memory_{term}" for term in terms)], rows)
