"""`loftq compare`: starts side by side, each as it loads from its files, against the original."""

from __future__ import annotations

from pathlib import Path

from loftq_cli.commands.run import Run, command
from loftq_cli.commands.spellings import option
from loftq_cli.containers import container_names, widths
from loftq_cli.options import CompareOptions, items
from loftq_cli.report.units import listed


@command(
    "compare",
    init=option(
        str | None,
        "--init",
        metavar="INIT,INIT,…",
        show_default="all for which there are texts",
        help="Starts to compare, by the names that quantize knows; qlora is always among them.",
    ),
    bits=option(str, "--bits", metavar="B,B,…", help=f"Bits of a weight, of {listed(widths())}."),
    container=option(
        str,
        "--container",
        metavar="C,C,…",
        help=f"How the weights lie in files, of {listed(container_names())}.",
    ),
    block_size=option(
        str,
        "--block-size",
        metavar="N,N,…",
        help="Weights that share one scale; what a container does not have is left out.",
    ),
    experts=option(
        str | None,
        "--experts",
        metavar="quantize,keep",
        show_default="as each container has it",
        help="What becomes of the matrices of experts, either or both.",
    ),
    text=option(
        Path | None,
        "--text",
        metavar="FILE",
        show_default="library code that the built-in model was not trained on",
        help="Text to evaluate on.",
    ),
    tasks=option(
        str | None,
        "--tasks",
        metavar="NAME,…",
        show_default="none",
        help="Tasks of lm-eval to score the starts on, or YAML files of such, before and after "
        "training.",
    ),
    train_text=option(Path | None, "--train-text", metavar="FILE", help="Text to fine-tune on."),
    train_steps=option(
        int | None,
        "--train-steps",
        min=1,
        metavar="N",
        show_default="no training",
        help="Fine-tune every start for N steps, as transformers' Trainer does by default.",
    ),
    learning_rate=option(
        str | None,
        "--learning-rate",
        metavar="X,X,…",
        show_default="each start's own best from 0.0001 to 0.008",
        help="The rates to choose from; from the middle one it goes to where it gets better.",
    ),
    seeds=option(
        int | None,
        "--seeds",
        min=1,
        max=1000,
        metavar="N",
        show_default="2",
        help="Fine-tune at the best rate with N seeds, from --seed on.",
    ),
)
def compare(run: Run, asked: CompareOptions) -> None:
    """
    \b
    loftq compare                                        (the built-in model)
    loftq compare --model org/name --text held-out.txt --calibration-text other.txt
    loftq compare --bits 4,2 --ranks 8,16 --train-steps 100 --train-text a.txt --text b.txt
    loftq compare --model org/name --tasks arc_easy,my-task.yaml
    loftq compare --container bitsandbytes,gptq --bits 4,3,2 --block-size 32,64

    Writes each start as quantize does, loads it with transformers and peft, and measures how far
    it is from the original model; and where a short fine-tune from it ends, each at the learning
    rate that suits it best. The files are not kept.
    """
    from loftq_cli.commands.compare_plan import methods, texts_of, training_of
    from loftq_cli.commands.compare_run import Bench

    training, texts = training_of(asked), texts_of(asked)
    planned = methods(asked, texts)
    if texts.evaluation_is_built_in and asked.model != "demo":
        run.note("evaluated on Python code, unless --text FILE says otherwise")
    if texts.evaluation_is_built_in and training is not None:
        run.warn(
            "the held-out loss is that of the built-in text, Python code, whatever --train-text "
            "is; give a --text of the kind that is trained on"
        )
    downstream = None
    if asked.tasks is not None:
        from loftq_cli.models.downstream import Downstream

        with run.timing("find_tasks", "finding the tasks"):
            downstream = Downstream(list(dict.fromkeys(items(asked.tasks, "--tasks"))))
    bench = Bench(run, asked, texts, training, downstream)
    run.finish(bench.compare(planned), model=bench.identity)
