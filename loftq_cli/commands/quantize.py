"""`loftq quantize`: a checkpoint becomes a packed backbone with its LoftQ adapter."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.commands.options import (
    Bits,
    BlockSize,
    Device,
    DoubleQuant,
    DryRun,
    Force,
    Init,
    Iterations,
    LoraAlpha,
    MaxMemory,
    Model,
    Output,
    QuantType,
    Rank,
    Resume,
    RsLora,
    Seed,
    Svd,
    TargetModules,
    TrustRemoteCode,
    Verify,
    size,
    split_list,
)
from loftq_cli.commands.run import Run, command
from loftq_cli.commands.verify import certify, require_passed
from loftq_cli.errors import UsageError

if TYPE_CHECKING:
    from loftq_cli.commands.quantize_result import Report
    from loftq_cli.engines.memory import MemoryPlan
    from loftq_cli.engines.plan import Plan, Settings
    from loftq_cli.models.spec import ResolvedModel


@command("quantize")
def quantize(
    run: Run,
    model: Model = "demo",
    output: Output = None,
    bits: Bits = 4,
    quant_type: QuantType = "nf4",
    block_size: BlockSize = 64,
    double_quant: DoubleQuant = False,
    init: Init = "loftq",
    rank: Rank = 16,
    iterations: Iterations = 5,
    svd: Svd = "auto",
    lora_alpha: LoraAlpha = None,
    rslora: RsLora = False,
    target_modules: TargetModules = "all-linear",
    device: Device = "auto",
    max_memory: MaxMemory = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
    resume: Resume = False,
    force: Force = False,
    verify: Verify = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    \b
    loftq quantize --model org/name --output OUT
    loftq quantize --output OUT                      (the built-in model)
    loftq quantize --model org/name --dry-run --json | jq .results.totals

    Writes a packed 4-bit backbone and a LoRA adapter that starts where the two together are
    closest to the original: a directory that plain transformers and peft load.
    """
    if output is None and not dry_run:
        raise UsageError("nowhere to write", hint="add --output DIR, or --dry-run")
    if bits not in (4, 8):
        raise UsageError(f"--bits {bits} is not supported", hint="--bits 4 or --bits 8")
    if force and resume:
        raise UsageError("--force replaces the output, --resume accepts it: choose one")
    if bits == 8 and (quant_type, block_size, double_quant) != ("nf4", 64, False):
        raise UsageError("8 bits have no --quant-type, --block-size or --double-quant")
    if init == "qlora" and (iterations, svd) != (5, "auto"):
        raise UsageError("--init qlora corrects nothing: --iterations and --svd have no effect")
    if verify and dry_run:
        raise UsageError("--dry-run writes nothing that --verify could open: choose one")
    limit = None if max_memory is None else size(max_memory, "--max-memory", plain_bytes=True)
    if limit is not None and device not in ("auto", "cpu"):
        raise UsageError(
            f"--max-memory counts memory of the CPU: not with --device {device}",
            hint="--device cpu",
        )
    from loftq_cli.engines.plan import Settings

    settings = Settings(
        bits=bits,
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        init=init,
        rank=rank,
        iterations=iterations,
        lora_alpha=float(rank) if lora_alpha is None else lora_alpha,
        use_rslora=rslora,
        svd=svd,
        target_modules=tuple(split_list(target_modules, "--target-modules")),
        seed=seed,
    )
    if bits == 8:
        run.warn(
            "8 bits: bitsandbytes' int8 layers also round the activations, which no adapter "
            "corrects; expect little gain from LoftQ here"
        )
    if dry_run:
        _dry_run(run, model, output, settings, limit)
    else:
        assert output is not None
        document, source, used = _quantize(
            run, model, output, settings, device, limit, resume, force, trust_remote_code
        )
        if not verify:
            run.emit(document)
            return
        certificate = certify(
            run, output, document, source, device=used, trust_remote_code=trust_remote_code
        )
        passed = [test.name for test in certificate.tests if test.status == "passed"]
        run.note(f"verified: {', '.join(passed) or 'nothing'}")
        for test in certificate.tests:
            if test.status == "skipped":
                run.note(f"verify: {test.name} {test.detail}")
        run.emit(document)
        require_passed(certificate)


def _dry_run(
    run: Run,
    spec: str,
    output: Path | None,
    settings: Settings,
    limit: int | None,
) -> None:
    """Reads headers and config only, and imports no torch."""
    from loftq_cli.commands.quantize_result import results_of
    from loftq_cli.engines import estimates
    from loftq_cli.engines.plan import make_plan
    from loftq_cli.models.layers import linear_layers
    from loftq_cli.models.lookup import find_model
    from loftq_cli.schema import ModelIdentity

    found = find_model(spec, run.note, with_headers=True)
    run.resolved("model", found.source, found.reason)
    assert found.checkpoint is not None
    assert found.config is not None
    tensors = [info for _, info in found.checkpoint.tensors.values()]
    plan = make_plan(linear_layers(tensors, found.config), settings)
    memory = _plan_memory(run, plan, limit)
    results = results_of(
        plan,
        found.checkpoint,
        output="" if output is None else str(output),
        architecture=found.outline.architecture,
        task_type=None,
        seconds=estimates.seconds(plan),
        peak_memory_bytes=memory.peak_bytes,
    )
    identity = ModelIdentity(id=found.id, revision=found.revision, source=found.source)
    run.finish(results, model=identity)


def _plan_memory(run: Run, plan: Plan, limit: int | None) -> MemoryPlan:
    """How much is held at once, by the same rule for a run and for a dry run."""
    from loftq_cli import hardware
    from loftq_cli.engines.estimates import Machine
    from loftq_cli.engines.memory import plan_memory

    memory = plan_memory(plan, limit, Machine(hardware.product_bytes(), hardware.threads()))
    run.resolved("memory_plan", memory.name, memory.reason)
    return memory


def _quantize(
    run: Run,
    spec: str,
    output: Path,
    settings: Settings,
    device: str,
    limit: int | None,
    resume: bool,
    force: bool,
    trust_remote_code: bool,
) -> tuple[Report, ResolvedModel, str]:
    """Writes the directory; the second and third are the source and the device that was used."""
    began = time.perf_counter()
    from loftq_cli import hardware
    from loftq_cli.checkpoint.index import open_checkpoint
    from loftq_cli.checkpoint.staging import Staging, refuse_existing
    from loftq_cli.checkpoint.writer import require_free_space
    from loftq_cli.commands import quantize_result as result
    from loftq_cli.engines import output as output_files
    from loftq_cli.engines.local import run_tasks
    from loftq_cli.engines.pipeline import Timings
    from loftq_cli.engines.plan import make_plan
    from loftq_cli.models.architecture import read_architecture
    from loftq_cli.models.source import companions, read_config, refuse_quantized
    from loftq_cli.models.spec import resolve_model

    # Before a model is downloaded for nothing; `Staging` looks again when it holds the lock.
    if force:
        result.refuse_to_replace_foreign(output)
    elif not resume:
        refuse_existing(output, force)
    with run.timing("resolve"):
        found = resolve_model(spec, with_code=trust_remote_code)
        config = read_config(found.directory)
        refuse_quantized(found.directory, config)
        checkpoint = open_checkpoint(found.directory)
    with run.timing("plan"):
        run.quiet_libraries()
        chosen = hardware.resolve_device(device)
        if limit is not None and chosen.value != "cpu":
            chosen = hardware.Choice("cpu", "--max-memory counts memory of the CPU")
            run.warn("--max-memory counts memory of the CPU: the GPU is not used")
        run.resolved("device", *chosen)
        architecture = read_architecture(
            found.directory, config, trust_remote_code=trust_remote_code
        )
        tensors = [info for _, info in checkpoint.tensors.values()]
        if unused := architecture.require_weights(tensors):
            run.warn(
                f"{len(unused)} tensors belong to nothing in {architecture.class_name} and are "
                f"only copied, {unused[0]} among them"
            )
        plan = make_plan(architecture.inventory(tensors), settings)
        memory = _plan_memory(run, plan, limit)
    fingerprint = output_files.fingerprint(checkpoint, config, settings, chosen.value)
    if resume and (document := result.finished_run(output, fingerprint)) is not None:
        run.note(f"{output} is already complete")
        return document, found, chosen.value

    with Staging(
        output, fingerprint=fingerprint, force=force, protected=[found.directory]
    ) as staging:
        kept = sum(entry.bytes for entry in staging.finished.values())
        if kept:
            run.note(f"going on with {staging.partial}: {len(staging.finished)} files are finished")
        require_free_space(output, int(1.02 * (plan.model_bytes + 2 * plan.adapter_bytes)) - kept)
        timings = Timings()
        with run.timing("tasks"), run.progress("quantizing", len(plan.layers)) as progress:
            try:
                outcomes = run_tasks(
                    plan,
                    checkpoint,
                    staging,
                    device=chosen.value,
                    progress=progress,
                    timings=timings,
                    warn=run.warn,
                    level=memory.level,
                )
            except BaseException as error:
                if not isinstance(error, Exception) and staging.finished:  # Ctrl-C or SIGTERM
                    finished = sum(task.file_name in staging.finished for task in plan.tasks)
                    run.note(
                        f"{finished} of {len(plan.tasks)} weight files are kept in "
                        f"{staging.partial}; run the same line again to go on"
                    )
                raise
        run.add_timings(timings.seconds)
        with run.timing("commit"):
            output_files.join_adapter(
                plan, checkpoint, staging, architecture, base_model=output.name
            )
            output_files.write_model_files(
                plan,
                staging,
                architecture,
                config,
                companions(found.directory, with_code=trust_remote_code),
            )
        document = run.document(
            result.results_of(
                plan,
                checkpoint,
                output=str(output),
                architecture=architecture.class_name,
                task_type=architecture.task_type,
                outcomes=outcomes,
                files=output_files.written_files(staging),
                fingerprint=result.digest(fingerprint),
                seconds=time.perf_counter() - began,
                peak_memory_bytes=hardware.peak_memory_bytes(),
            ),
            model=result.identity_of(found),
        )
        result.write_document(staging, document)
        staging.commit()
    return document, found, chosen.value
