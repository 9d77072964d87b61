"""`loftq sweep-ranks`: what each rank would cost, whether it fits, and what it would buy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from loftq_cli.commands.run import Run, command
from loftq_cli.commands.spellings import option
from loftq_cli.containers import container_names, widths
from loftq_cli.errors import DoesNotFit, UsageError
from loftq_cli.formats import DEFAULT_CONTAINER
from loftq_cli.options import SweepOptions, choice, items, ranks, size

if TYPE_CHECKING:
    from loftq_cli import schema
    from loftq_cli.containers.base import Container
    from loftq_cli.engines.settings import Settings
    from loftq_cli.models.layers import LinearLayer
    from loftq_cli.models.lookup import FoundModel

SEQUENCE_LENGTH = 1024
_HELD = (*widths(), 16)


@command(
    "sweep-ranks",
    bits=option(
        Literal[_HELD],
        "--bits",
        metavar="|".join(map(str, _HELD)),
        help="Bits of a weight while fine-tuning; 16 is plain LoRA. In bitsandbytes 2 and 3 take "
        "the memory of 4.",
    ),
)
def sweep_ranks(run: Run, asked: SweepOptions) -> None:
    """
    \b
    loftq sweep-ranks --model gpt2
    loftq sweep-ranks --model meta-llama/Llama-3.1-8B --vram 24GB
    loftq sweep-ranks --error                 (the built-in model, measured)
    loftq sweep-ranks --error --bits 2 --calibration-text FILE

    Shows what every rank trains and what memory fine-tuning takes, term by term with --json. Only
    configs and headers are read, and well-known models need no files at all; with --error the
    weights are read too, each of them once for all ranks, and with --calibration-text it is told
    as well what each rank leaves of the error in the layers' outputs.
    """
    from loftq_cli.commands.sweep_errors import errors_at, measure_errors
    from loftq_cli.engines.experts import experts_of
    from loftq_cli.engines.plan import as_asked, make_plan
    from loftq_cli.engines.settings import Settings
    from loftq_cli.models.lookup import fetch_model, find_model
    from loftq_cli.report.rank_verdict import verdict
    from loftq_cli.schema import SweepRanksResults, SweepSettings

    wanted = ranks(asked.ranks)
    vram_bytes = None if asked.vram is None else size(asked.vram, "--vram")
    choice(asked.container, "--container", container_names())
    settings = Settings(
        bits=asked.bits,
        container_name=asked.container,
        quant_type=asked.quant_type,
        block_size=asked.block_size,
        rank=1,
        target_modules=tuple(items(asked.target_modules, "--target-modules")),
    )
    container = settings.container
    _require_meaning(asked, container)
    with run.timing("resolve"):
        if asked.error:
            found = fetch_model(asked.model)
        else:
            found = find_model(asked.model, run.note, with_headers=asked.preflight)
    run.resolved("model", found.identity.source, found.reason)
    if asked.preflight:
        from loftq_cli.engines.preflight import ask_found, outline_asked

        with run.timing("plan"):
            plan = ask_found(found, settings).plan
        found = replace(found, outline=outline_asked(found.outline, plan))
    else:
        plan = make_plan(found.outline.inventory, settings)
    entries = [entry for task in plan.tasks for entry in task.entries]
    inventory = as_asked(found.outline.inventory, settings)
    found = replace(found, outline=replace(found.outline, inventory=inventory))
    planned = plan.layers
    adapted = [
        *(each.layer for each in planned if each.adapted),
        *(layer for stack in plan.stacks for layer in stack.layers),
    ]
    _warn_of_large_ranks(run, adapted, wanted)
    measured, calibration = None, None
    if asked.error:
        measured, calibration = measure_errors(
            run, found, planned, settings, wanted, asked.device, asked.calibration_text
        )
    tokens = _sequence_length(run, asked.sequence_length, found.outline.context)
    in_step = asked.batch_size * tokens
    costs = [
        _rank_cost(found, adapted, rank, settings, in_step, vram_bytes, errors_at(measured, place))
        for place, rank in enumerate(wanted)
    ]
    plain_error = None if measured is None else measured.weights.quantized_only
    outputs = None if measured is None else measured.outputs
    plain_output_error = None if outputs is None else outputs.quantized_only
    outcome = verdict(costs, plain_error, vram_bytes, plain_output_error)
    results = SweepRanksResults(
        architecture=found.outline.architecture,
        counted_by="class" if asked.preflight else "names",
        base_parameters=found.outline.parameters,
        quantized_parameters=sum(each.layer.parameters * container.quantizes for each in planned),
        modules=sum(each.adapted for each in planned),
        experts=experts_of(entries, settings, found.outline.parameters),
        settings=SweepSettings(
            target_modules=list(settings.target_modules),
            bits=asked.bits,
            container=container.name if container.quantizes else DEFAULT_CONTAINER,
            packed=container.stays_packed,
            quant_type=None if container.block_size is None else container.quant_type,
            block_size=container.block_size,
            batch_size=asked.batch_size,
            sequence_length=tokens,
            vram_bytes=vram_bytes,
            calibration=calibration,
        ),
        quantized_only_error_relative=plain_error,
        quantized_only_output_error_relative=plain_output_error,
        ranks=costs,
        verdict=outcome,
    )
    run.finish(results, model=found.identity)
    if outcome.recommended_rank is None:
        raise DoesNotFit(
            f"no rank fits in {asked.vram}",
            cause=outcome.sentence,
            hint="a shorter --sequence-length, a smaller --batch-size, fewer --target-modules"
            f", or {_smaller(asked, container)}",
        )


def _require_meaning(asked: SweepOptions, container: Container) -> None:
    """Refuses what there is not, and options that would have no effect."""
    if asked.error and not container.quantizes:
        raise UsageError(
            "at 16 bits there is no quantization error to measure", hint="--bits 4 or --bits 8"
        )
    if not asked.error and asked.device != "auto":
        raise UsageError("--device has no effect without --error", hint="add --error")
    if not asked.error and asked.calibration_text is not None:
        raise UsageError("--calibration-text has no effect without --error", hint="add --error")
    form = ("quant_type", "block_size")
    given = {name for name in form if getattr(asked, name) != getattr(SweepOptions, name)}
    if not container.quantizes and asked.container != DEFAULT_CONTAINER:
        raise UsageError(f"{asked.bits} bits have no --container", hint="--bits 4")
    if given and not container.options:
        raise UsageError(f"{asked.bits} bits have no --quant-type and no --block-size")
    if given - {*container.options}:
        raise UsageError(f"--container {asked.container} has no --quant-type")
    if asked.bits not in container.widths:
        raise UsageError(
            f"{asked.quant_type} has {max(container.widths)} bits only",
            hint=f"--quant-type {container.number_types[0]}",
        )
    if container.why_uncalibrated is not None and asked.calibration_text is not None:
        raise UsageError(
            "--calibration-text is for 4 bits and fewer",
            cause=container.why_uncalibrated,
            hint="--bits 4",
        )


def _smaller(asked: SweepOptions, container: Container) -> str:
    """What would take less memory than what was asked for."""
    if not container.stays_packed:
        return f"--container {container.instead}"
    if asked.bits > SweepOptions.bits:
        return f"--bits {SweepOptions.bits}"
    fewest = min(container.all_widths)
    if container.code_bits(fewest) < container.code_bits(asked.bits):
        return f"--bits {fewest}"
    return "a smaller model"


def _sequence_length(run: Run, asked: int | None, context: int | None) -> int:
    if asked is None:
        tokens = min(SEQUENCE_LENGTH, context or SEQUENCE_LENGTH)
        reason = "the default" if tokens == SEQUENCE_LENGTH else "all that the model can read"
        run.resolved("sequence_length", tokens, reason)
        return tokens
    if context is not None and asked > context:
        run.warn(f"this model reads {context} tokens at once, not {asked}")
    return asked


def _warn_of_large_ranks(run: Run, adapted: list[LinearLayer], ranks: list[int]) -> None:
    smallest = min(adapted, key=lambda each: min(each.stored_shape))
    rows, columns = smallest.out_features, smallest.in_features
    limit = min(rows, columns)
    if max(ranks) > limit:
        run.warn(
            f"a rank above {limit} is more than {smallest.module} ({rows} × {columns}) can "
            "use: `loftq quantize` refuses it"
        )


def _rank_cost(
    found: FoundModel,
    adapted: list[LinearLayer],
    rank: int,
    settings: Settings,
    tokens: int,
    vram_bytes: int | None,
    errors: dict[str, float],
) -> schema.RankCost:
    from loftq_cli.models.costs import memory, trainable_parameters
    from loftq_cli.schema import RankCost

    base = found.outline.parameters
    trainable = trainable_parameters(adapted, rank)
    needed = memory(
        found.outline, adapted, rank, held=settings.container, bits=settings.bits, tokens=tokens
    )
    return RankCost(
        rank=rank,
        trainable_parameters=trainable,
        total_parameters=base + trainable,
        trainable_percent=round(100 * trainable / (base + trainable), 4),
        reduction_factor=round(base / trainable, 2),
        adapter_bytes=needed.adapter_bytes,
        memory=needed,
        fits=None if vram_bytes is None else needed.total_bytes <= vram_bytes,
        fits_with_checkpointing=None
        if vram_bytes is None
        else needed.total_with_checkpointing_bytes <= vram_bytes,
        **errors,
    )
