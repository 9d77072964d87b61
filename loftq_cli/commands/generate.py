"""`loftq generate`: text from a model with its adapter."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from loftq_cli.commands.options import Device, Dtype, MaxNewTokens, Model, Prompt
from loftq_cli.commands.run import Run, command
from loftq_cli.errors import UsageError

if TYPE_CHECKING:
    from loftq_cli.models.loading import LoadedModel
    from loftq_cli.schema import Generation


@command("generate")
def generate(
    run: Run,
    model: Model = "demo",
    prompt: Prompt = None,
    max_new_tokens: MaxNewTokens = 40,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Continue prompts with a model and, in a directory that `quantize` wrote, its adapter.

    Example: loftq generate --model OUT --prompt "def read_file(path):"
    """
    if not prompt:
        raise UsageError("nothing to continue", hint='--prompt "Once upon a time"')
    from loftq_cli.commands.loaded import load_for_run
    from loftq_cli.models.loading import require_text_model
    from loftq_cli.schema import GenerateResults

    resolved, loaded, where = load_for_run(run, model, device, dtype)
    require_text_model(loaded)
    with run.timing("generate"):
        generations = [_continue(loaded, text, max_new_tokens) for text in prompt]
    seconds = sum(each.seconds for each in generations)
    tokens = sum(each.new_tokens for each in generations)
    run.finish(
        GenerateResults(
            generations=generations,
            average_seconds=seconds / len(generations),
            average_tokens_per_second=tokens / seconds,
            max_new_tokens=max_new_tokens,
            device=where.device,
            dtype=where.dtype,
            adapter=loaded.adapter,
        ),
        model=resolved,
    )


def _continue(loaded: LoadedModel, prompt: str, max_new_tokens: int) -> Generation:
    """Greedy decoding of one prompt, timed from the first to the last token."""
    import torch

    from loftq_cli.schema import Generation

    model: Any = loaded.model
    inputs = loaded.tokenizer(prompt, return_tensors="pt").to(model.device)
    began = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    seconds = time.perf_counter() - began
    # A decoder returns the prompt too; an encoder-decoder only what it wrote, after a start token.
    given = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    new = output[0, given:]
    return Generation(
        prompt=prompt,
        generated_text=loaded.tokenizer.decode(new, skip_special_tokens=True),
        new_tokens=len(new),
        seconds=seconds,
        tokens_per_second=len(new) / seconds,
    )
