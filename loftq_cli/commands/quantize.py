"""`loftq quantize`: a checkpoint becomes a packed backbone with its LoftQ adapter."""

from __future__ import annotations

from loftq_cli.commands.options import (
    Bits,
    BlockSize,
    CalibrationText,
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
    RankBudget,
    Resume,
    RsLora,
    Seed,
    Svd,
    TargetBits,
    TargetModules,
    TrustRemoteCode,
    UniformRank,
    Verify,
    size,
)
from loftq_cli.commands.run import Run, command
from loftq_cli.errors import UsageError


@command("quantize")
def quantize(
    run: Run,
    model: Model = "demo",
    output: Output = None,
    bits: Bits = None,
    target_bits: TargetBits = None,
    quant_type: QuantType = "nf4",
    block_size: BlockSize = 64,
    double_quant: DoubleQuant = False,
    init: Init = "loftq",
    calibration_text: CalibrationText = None,
    rank: Rank = 16,
    rank_budget: RankBudget = False,
    uniform_rank: UniformRank = False,
    iterations: Iterations = "auto",
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
    if force and resume:
        raise UsageError("--force replaces the output, --resume accepts it: choose one")
    if verify and dry_run:
        raise UsageError("--dry-run writes nothing that --verify could open: choose one")
    limit = None if max_memory is None else size(max_memory, "--max-memory", plain_bytes=True)
    if limit is not None and device not in ("auto", "cpu"):
        raise UsageError(
            f"--max-memory counts memory of the CPU: not with --device {device}",
            hint="--device cpu",
        )
    from loftq_cli.commands.quantize_settings import settings_of
    from loftq_cli.engines.job import Job, foresee_directory, make_directory

    settings = settings_of(
        bits=bits,
        target_bits=target_bits,
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        init=init,
        calibration_text=calibration_text,
        rank=rank,
        rank_budget=rank_budget,
        uniform_rank=uniform_rank,
        iterations=iterations,
        lora_alpha=lora_alpha,
        rslora=rslora,
        svd=svd,
        target_modules=target_modules,
        seed=seed,
    )
    if settings.bits == 8:
        run.warn(
            "8 bits: bitsandbytes' int8 layers also round the activations, which no adapter "
            "corrects; expect little gain from LoftQ here"
        )
    if dry_run:
        run.emit(foresee_directory(model, settings, limit, run, output))
        return
    assert output is not None
    job = Job(
        model=model,
        output=output,
        settings=settings,
        device=device,
        calibration_text=calibration_text,
        memory_limit=limit,
        resume=resume,
        force=force,
        trust_remote_code=trust_remote_code,
    )
    made = make_directory(job, run)
    if not verify:
        run.emit(made.document)
        return
    from loftq_cli.checks.written.certify import certify, require_passed

    certificate = certify(
        run,
        output,
        made.document,
        made.source,
        device=made.device,
        trust_remote_code=trust_remote_code,
    )
    passed = [test.name for test in certificate.tests if test.status == "passed"]
    run.note(f"verified: {', '.join(passed) or 'nothing'}")
    for test in certificate.tests:
        if test.status == "skipped":
            run.note(f"verify: {test.name} {test.detail}")
    run.emit(made.document)
    require_passed(certificate)
