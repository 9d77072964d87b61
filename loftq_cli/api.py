"""What Python code can call: the commands' jobs, with their options, without their printing."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.errors import UsageError
from loftq_cli.options import QuantizeOptions, refuse_both, require_text, size

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from loftq_cli.engines.job import Job, Made
    from loftq_cli.engines.report_file import Report
    from loftq_cli.formats import (
        AdapterDtype,
        CalibrationOrder,
        EngineName,
        Experts,
        QuantStorage,
        QuantType,
        SvdMethod,
    )
    from loftq_cli.record import Listener, Record
    from loftq_cli.schema import Document, QuantizeResults, VerifyResults


def quantize(
    model: str = "demo",
    *,
    output: str | Path | None = None,
    bits: int | str | None = None,
    target_bits: float | None = None,
    container: str = "bitsandbytes",
    quant_type: QuantType = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
    quant_storage: QuantStorage = "uint8",
    experts: Experts | None = None,
    init: str = "loftq",
    calibration_text: str | Path | None = None,
    calibration_order: CalibrationOrder | None = None,
    distill_steps: int | None = None,
    rank: int = 16,
    rank_budget: bool = False,
    uniform_rank: bool = False,
    iterations: int | str = "auto",
    svd: SvdMethod = "auto",
    lora_alpha: float | None = None,
    rslora: bool = False,
    target_modules: str | Sequence[str] = "all-linear",
    adapter_dtype: AdapterDtype = "float32",
    device: str = "auto",
    dtype: str = "auto",
    engine: EngineName = "local",
    ray_address: str = "auto",
    workers: int | None = None,
    max_memory: int | str | None = None,
    stream: bool = False,
    seed: int = 0,
    dry_run: bool = False,
    preflight: bool = False,
    resume: bool = False,
    force: bool = False,
    verify: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    trust_remote_code: bool = False,
    listener: Listener | None = None,
) -> Document[QuantizeResults]:
    """Writes what `loftq quantize` writes, and gives the document that it would print.

    The arguments are the command's options (`loftq quantize --help`). Nothing is printed.

    Args:
        workers: with more than one, a script has to call this below `if __name__ == "__main__":`,
            since each of those processes imports it.
        listener: is told notes, warnings and progress (see `loftq_cli.record.Listener`).

    Raises:
        LoftqError: as the command reports it (see `loftq_cli.errors`).
        CheckFailed: with ``verify``, a check failed; the error has the document.
    """
    options = {**locals()}
    del options["listener"]
    from loftq_cli.checks.written.certify import require_passed

    for name in ("model", "output", "calibration_text"):
        if options[name] is not None:
            require_text(name, str(options[name]))
    for path in ("output", "calibration_text"):
        if options[path] is not None:
            options[path] = Path(options[path])
    asked = QuantizeOptions(**options)
    with _recording("quantize", shlex.split(asked.command_line()), listener) as record:
        document, certificate = run_quantize(asked, record)
        if certificate is not None:
            require_passed(certificate, document)
        push_quantized(asked, record)
    return document


def verify(
    directory: str | Path,
    *,
    source: str | None = None,
    sample: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    listener: Listener | None = None,
) -> Document[VerifyResults]:
    """Proves what `quantize` wrote, and gives the certificate that `loftq verify` would print.

    Args:
        source: the model it was made from; None: as the report names it.
        sample: so many layers are measured against the source; None: all.
        dtype: to load the model in for the forward pass; "auto": as the directory's README has it.
        listener: is told notes, warnings and progress (see `loftq_cli.record.Listener`).

    Raises:
        CheckFailed: a check failed; the error has the certificate.
        LoftqError: there is nothing that could be checked.
    """
    from loftq_cli.checks.written.certify import require_passed, verify_directory

    if sample is not None and sample < 1:
        raise UsageError(f"--sample {sample} measures nothing", hint="--sample 1")
    argv = ["loftq", "verify", str(directory)]
    given = {"--source": source, "--sample": sample, "--device": device, "--dtype": dtype}
    for option, value in given.items():
        argv += [] if value in (None, "auto") else [option, str(value)]
    argv += ["--trust-remote-code"] * trust_remote_code
    with _recording("verify", argv, listener) as record:
        document = verify_directory(
            record, Path(directory), source, sample, device, dtype, trust_remote_code
        )
    require_passed(document.results, document)
    return document


def load(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    trainable: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel | PeftModel:
    """The model that `quantize` wrote, with its adapter, in evaluation mode: `model.train()` next.

    Layers in bitsandbytes' 4 or 8 bits stay packed, as transformers loads them, and so do experts,
    which transformers 5 does not load: bitsandbytes' own parametrization dequantizes those of a
    block when it runs. Autograd keeps what a forward pass dequantized until the backward pass, so
    train with activation checkpointing. PEFT's adapters go on attention and shared layers as ever;
    on packed experts they are refused, since PEFT 0.21.2 would add them once more in every forward
    pass. Integer codes (gptq, compressed-tensors) become weights in ``dtype``.

    Args:
        model: a directory, or the name of one on the hub.
        adapter: the directory of one that was trained on it; None: the start beside the model, if
            there is one.
        trainable: whether the adapter is to be trained further.
        device: "auto", "cpu", "cuda" or "cuda:N"; the whole model goes there.
        dtype: to compute in, "float32", "bfloat16" or "float16"; "auto": that of the files.

    Raises:
        LoftqError: as `loftq load` reports it (see `loftq_cli.errors`).
    """
    from loftq_cli import hardware, options
    from loftq_cli.libraries import quietly
    from loftq_cli.models.dtypes import stored_dtype
    from loftq_cli.models.loading import load_model
    from loftq_cli.models.source import read_config
    from loftq_cli.models.spec import resolve_model

    options.dtype(dtype)
    with quietly():
        source = resolve_model(str(model), with_code=trust_remote_code)
        directory, on_hub = source.directory, source.identity.source == "hub"
        place = hardware.resolve_device(device).value
        stored = stored_dtype(read_config(directory))
        loaded = load_model(
            directory,
            device=place,
            dtype=hardware.resolve_dtype(dtype, place, stored).value,
            adapter=None if adapter is None else Path(adapter),
            trainable=trainable,
            trust_remote_code=trust_remote_code,
        )
    if trainable and loaded.adapter is None:
        raise UsageError(
            f"{model} has no adapter to train",
            hint="adapter=DIRECTORY; or put one on with PEFT, and leave trainable out",
        )
    if loaded.adapter is not None:  # what is trained names it, and PEFT looks there
        base = str(model) if on_hub else str(directory.resolve())
        loaded.model.peft_config["default"].base_model_name_or_path = base
    found: PreTrainedModel | PeftModel = loaded.model
    return found


def run_quantize(asked: QuantizeOptions, record: Record) -> tuple[Report, VerifyResults | None]:
    """What the command and the function `quantize` do: the document, and with --verify what of it
    was proved.

    Raises:
        UsageError: two options contradict each other.
        LoftqError: whatever is wrong with the model, the settings or the disk.
    """
    if asked.output is None and not asked.dry_run:
        raise UsageError("nowhere to write", hint="add --output DIR, or --dry-run")
    refuse_both(force=asked.force, resume=asked.resume)
    if asked.verify and asked.dry_run:
        raise UsageError("--dry-run writes nothing that --verify could open: choose one")
    if asked.private and asked.push_to_hub is None:
        raise UsageError("--private is for --push-to-hub", hint="add --push-to-hub ID")
    if asked.push_to_hub is not None:
        if asked.dry_run:
            raise UsageError("--dry-run writes nothing that --push-to-hub could upload: choose one")
        from loftq_cli.engines.hub import require_pushable

        require_pushable(asked.push_to_hub)
    limit = None
    if asked.max_memory is not None:
        limit = size(asked.max_memory, "--max-memory", plain_bytes=True)
        if asked.device not in ("auto", "cpu"):
            raise UsageError(
                f"--max-memory counts memory of the CPU: not with --device {asked.device}",
                hint="--device cpu",
            )
    if asked.preflight and not asked.dry_run:
        raise UsageError(
            "--preflight is for --dry-run", cause="a run always asks", hint="leave it out"
        )
    from loftq_cli.engines.cluster import require_cluster_options
    from loftq_cli.engines.job import Job, foresee_directory, make_directory
    from loftq_cli.engines.settings import settings_of
    from loftq_cli.engines.workers import deal_out

    require_cluster_options(asked)
    settings = settings_of(asked)
    if asked.stream and settings.calibration is not None:
        raise UsageError(
            f"--init {settings.init} runs the original model: not with --stream",
            cause="all of its weights would have to be on this disk, or in memory",
            hint="leave --stream out, or choose a start without a calibration text",
        )
    workers = len(deal_out(asked.device.split(","), asked.workers))
    if settings.container.warning is not None:
        record.warn(settings.container.warning)
    if asked.dry_run:
        foreseen = foresee_directory(
            asked.model,
            settings,
            limit,
            workers,
            record,
            asked.output,
            preflight=asked.preflight,
            stream=asked.stream,
            trust_remote_code=asked.trust_remote_code,
        )
        return foreseen, None
    assert asked.output is not None
    job = Job(
        model=asked.model,
        output=asked.output,
        settings=settings,
        device=asked.device,
        calibration_text=asked.calibration_text,
        engine=asked.engine,
        ray_address=asked.ray_address,
        workers=asked.workers,
        memory_limit=limit,
        stream=asked.stream,
        resume=asked.resume,
        force=asked.force,
        trust_remote_code=asked.trust_remote_code,
    )
    made = make_directory(job, record)
    return made.document, _proved(job, made, record) if asked.verify else None


def push_quantized(asked: QuantizeOptions, record: Record) -> None:
    """Uploads what `run_quantize` wrote, where --push-to-hub asks for it.

    Raises:
        LoftqError: as `engines.push.push`; what was written stays.
    """
    if asked.push_to_hub is None or asked.output is None:
        return
    from loftq_cli.engines.push import push
    from loftq_cli.engines.report_file import read_report

    report = read_report(asked.output)
    done = push(record, asked.output, report, asked.push_to_hub, private=asked.private)
    record.note(f"pushed to {done.url}, commit {done.commit}")


def _proved(job: Job, made: Made, record: Record) -> VerifyResults:
    from loftq_cli.checks.written.certify import certify

    certificate = certify(
        record,
        job.output,
        made.document,
        made.source,
        device=made.device,
        trust_remote_code=job.trust_remote_code,
    )
    passed = [test.name for test in certificate.tests if test.status == "passed"]
    record.note(f"verified: {', '.join(passed) or 'nothing'}")
    for test in certificate.tests:
        if test.status == "skipped":
            record.note(f"verify: {test.name} {test.detail}")
        for note in test.notes:
            record.note(f"verify: {test.name}: {note}")
    return certificate


@contextmanager
def _recording(name: str, argv: Sequence[str], listener: Listener | None) -> Iterator[Record]:
    """A record of one call, during which no library prints anything."""
    from loftq_cli.libraries import quietly
    from loftq_cli.record import Listener, Record

    with quietly():
        yield Record(name, argv, listener or Listener())
