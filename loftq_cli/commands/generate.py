"""`loftq generate`: text from a model with its adapter, and how long it takes."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.commands.prompts import read_prompts
from loftq_cli.commands.run import Run, command
from loftq_cli.commands.spellings import option
from loftq_cli.errors import ModelNotFound, UsageError
from loftq_cli.options import LARGEST_RANK, LARGEST_SEED
from loftq_cli.record import Progress

if TYPE_CHECKING:
    from loftq_cli.models.generation import Sampling
    from loftq_cli.models.loading import LoadedModel
    from loftq_cli.schema import Generation


@command(
    "generate",
    prompts_file=option(
        Path | None,
        "--prompts-file",
        metavar="FILE",
        help="A file of prompts, one a line; - is stdin.",
    ),
    temperature=option(
        float | None,
        "--temperature",
        metavar="T",
        show_default="the likeliest token each time",
        help="Sample; below 1 keeps to the likely, above 1 strays.",
    ),
    top_p=option(
        float | None,
        "--top-p",
        metavar="P",
        help="Sample only from the likeliest tokens that make up P of the probability.",
    ),
    seed=option(
        int | None,
        "--seed",
        min=0,
        max=LARGEST_SEED,
        metavar="N",
        show_default="0",
        help="Where sampling starts.",
    ),
    rank=option(
        int | None,
        "--rank",
        min=1,
        max=LARGEST_RANK,
        metavar="R",
        help="Put a new adapter on the model; it changes no text, only the time.",
    ),
    adapter=option(
        Path | None,
        "--adapter",
        metavar="DIR",
        show_default="loftq_init in the model's directory, if it is there",
        help="Put this adapter on the model.",
    ),
)
def generate(
    run: Run,
    model: str = "demo",
    prompt: list[str] | None = None,
    prompts_file: Path | None = None,
    max_new_tokens: int = 40,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    rank: int | None = None,
    adapter: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """
    \b
    loftq generate --model OUT --prompt "def main" --prompt "class Stack:"
    loftq generate --model OUT --adapter trained-adapter --prompts-file prompts.txt
    head -5 prompts.txt | loftq generate --temperature 0.8 --json

    Continues prompts with a model and its adapter, and says how fast. A directory that quantize
    wrote brings its adapter along.
    """
    sampling = _sampling(temperature, top_p, seed)
    if rank is not None and adapter is not None:
        raise UsageError("--rank makes a new adapter, --adapter takes one: choose one")
    if adapter is not None:
        _require_directory(adapter)
    prompts = read_prompts(prompt, prompts_file, run.note)
    from loftq_cli.commands.loaded import load_for_run
    from loftq_cli.models.generation import warm_up
    from loftq_cli.models.loading import require_text_model
    from loftq_cli.schema import GenerateResults

    identity, loaded, where = load_for_run(
        run,
        model,
        device,
        dtype,
        adapter=adapter,
        fresh_rank=rank,
        trust_remote_code=trust_remote_code,
    )
    require_text_model(loaded)
    if rank is not None:
        run.note("the new adapter starts at B = 0: the text is that of the model without it")
    lengths = [_length(run, loaded, text, max_new_tokens) for text in prompts]
    with run.timing("warm_up", "warming up"):
        warm_up(loaded, prompts[0], lengths[0])
    with run.timing("generate"):
        generations = _generate(run, loaded, prompts, lengths, sampling)
    seconds = sum(each.seconds for each in generations)
    run.finish(
        GenerateResults(
            generations=generations,
            average_seconds=seconds / len(generations),
            average_tokens_per_second=sum(each.new_tokens for each in generations) / seconds,
            max_new_tokens=max_new_tokens,
            device=where.device,
            dtype=where.dtype,
            adapter=loaded.adapter,
            temperature=None if sampling is None else sampling.temperature,
            top_p=None if sampling is None else sampling.top_p,
            seed=None if sampling is None else sampling.seed,
        ),
        model=identity,
    )


def _require_directory(adapter: Path) -> None:
    """Before a model is loaded for nothing."""
    try:
        adapter.stat()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise ModelNotFound(
            f"no adapter in {adapter}",
            cause="there is no such directory" if missing else error.strerror,
            hint="give the directory that has adapter_config.json in it",
        ) from None


def _sampling(temperature: float | None, top_p: float | None, seed: int | None) -> Sampling | None:
    """How to choose tokens; what would have no effect is refused."""
    if temperature is None:
        for name, value in (("--top-p", top_p), ("--seed", seed)):
            if value is not None:
                raise UsageError(
                    f"{name} has no effect here",
                    cause="without --temperature every token is the likeliest one",
                    hint=f"add --temperature 0.8, or leave {name} out",
                )
        return None
    if not 1e-4 <= temperature <= 1e4:  # beyond, the softmax overflows
        above = "not above 0" if not temperature > 0 else "out of range"
        raise UsageError(
            f"--temperature {temperature:g} is {above}",
            hint="leave it out for the likeliest token each time",
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p:g} is not a share of the probability", hint="--top-p 0.9")
    from loftq_cli.models.generation import Sampling

    return Sampling(temperature, 1.0 if top_p is None else top_p, 0 if seed is None else seed)


def _length(run: Run, loaded: LoadedModel, prompt: str, wanted: int) -> int:
    """How much to write after this prompt: what is wanted, or as much as the context holds."""
    from loftq_cli.models.generation import room_for

    room = room_for(loaded, prompt)
    if room is None or room >= wanted:
        return wanted
    shown = prompt if len(prompt) <= 40 else f"{prompt[:37]}..."
    run.warn(f"only {room} of {wanted} new tokens fit into the model's context after {shown!r}")
    return room


def _generate(
    run: Run,
    loaded: LoadedModel,
    prompts: list[str],
    lengths: list[int],
    sampling: Sampling | None,
) -> list[Generation]:
    """All prompts in turn; whoever watches sees the text as it comes."""
    from loftq_cli.models.generation import continue_text
    from loftq_cli.schema import Generation

    generations = []
    with ExitStack() as shown:
        progress, tell = Progress(), shown.enter_context(run.growing_text())
        if tell is None:
            progress = shown.enter_context(run.progress("generating", len(prompts)))
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            if tell is not None:
                tell(f"{chr(10) * 2 if number else ''}› {prompt}\n")
            # Each prompt from a seed of its own: the same prompt twice gives two texts, and a
            # prompt keeps its text when others before it change.
            drawn = (
                None
                if sampling is None
                else replace(sampling, seed=(sampling.seed + number) % (LARGEST_SEED + 1))
            )
            done = continue_text(loaded, prompt, length, sampling=drawn, tell=tell)
            generations.append(
                Generation(
                    prompt=prompt,
                    generated_text=done.text,
                    new_tokens=done.new_tokens,
                    seconds=done.seconds,
                    tokens_per_second=done.new_tokens / done.seconds,
                    prompt_tokens=done.prompt_tokens,
                )
            )
            progress.advance()
    return generations
