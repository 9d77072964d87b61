"""`loftq compare`: starts side by side, each as it loads from its files, against the original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loftq_cli.commands.options import (
    BlockSize,
    CalibrationText,
    Device,
    DoubleQuant,
    Dtype,
    Iterations,
    LoraAlpha,
    Model,
    QuantType,
    Ranks,
    RsLora,
    Seed,
    TargetModules,
    TrustRemoteCode,
)
from loftq_cli.commands.run import Run, command

if TYPE_CHECKING:
    from loftq_cli.commands.compare_plan import Texts


@command("compare")
def compare(
    run: Run,
    model: Model = "demo",
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="INIT,INIT,…",
            show_default="all for which there are texts",
            help="Starts to compare, by the names that quantize knows; qlora is always among them.",
        ),
    ] = None,
    bits: Annotated[
        str,
        typer.Option("--bits", metavar="B,B,…", help="Bits of a weight, of 2, 3, 4 and 8."),
    ] = "4",
    ranks: Ranks = "16",
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            show_default="library code that the built-in model was not trained on",
            help="Text to evaluate on.",
        ),
    ] = None,
    calibration_text: CalibrationText = None,
    train_text: Annotated[
        Path | None,
        typer.Option("--train-text", metavar="FILE", help="Text to fine-tune on."),
    ] = None,
    train_steps: Annotated[
        int | None,
        typer.Option(
            "--train-steps",
            min=1,
            metavar="N",
            show_default="no training",
            help="Fine-tune every start for N steps of 8 windows, all in the same order.",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            metavar="X",
            show_default="0.0004",
            help="The learning rate of that, constant after a warmup.",
        ),
    ] = None,
    quant_type: QuantType = "nf4",
    block_size: BlockSize = 64,
    double_quant: DoubleQuant = False,
    iterations: Iterations = "auto",
    lora_alpha: LoraAlpha = None,
    rslora: RsLora = False,
    target_modules: TargetModules = "all-linear",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    \b
    loftq compare                                        (the built-in model)
    loftq compare --model org/name --text held-out.txt --calibration-text other.txt
    loftq compare --bits 4,2 --ranks 8,16 --train-steps 100 --train-text a.txt --text b.txt

    Writes each start as quantize does, loads it with transformers and peft, and measures how far
    it is from the original model; and where a short fine-tune from it ends. The files are not
    kept.
    """
    from loftq_cli.commands.compare_plan import Asked, methods, texts_of
    from loftq_cli.commands.compare_run import Bench

    texts = texts_of(model, text, calibration_text, train_text, train_steps, learning_rate)
    asked = Asked(
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        iterations=iterations,
        lora_alpha=lora_alpha,
        rslora=rslora,
        target_modules=target_modules,
        seed=seed,
    )
    planned = methods(init, bits, ranks, asked, texts)
    _warn(run, model, texts)
    bench = Bench(run, model, device, dtype, texts, asked, trust_remote_code)
    results = bench.compare(planned)
    run.finish(results, model=bench.identity)


def _warn(run: Run, model: str, texts: Texts) -> None:
    if texts.evaluation_is_built_in and model != "demo":
        run.note("evaluated on Python code, unless --text FILE says otherwise")
    if texts.evaluation_is_built_in and texts.training is not None:
        run.warn(
            "the held-out loss is that of the built-in text, Python code, whatever --train-text "
            "is; give a --text of the kind that is trained on"
        )
