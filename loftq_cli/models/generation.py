"""Continues a text with a loaded model, and times it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loftq_cli.errors import InvalidSetting
from loftq_cli.models.loading import LoadedModel

_WARM_UP_SECONDS = 2.0


@dataclass(frozen=True)
class Sampling:
    """Draws each token from the model's probabilities instead of taking the likeliest."""

    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Continuation:
    """What a model wrote. ``new_tokens`` counts the end-of-text token too, if it wrote one."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float


def context_length(model: Any) -> int | None:
    """How many tokens the model has positions for; None where nothing limits it."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def room_for(loaded: LoadedModel, prompt: str) -> int | None:
    """How many tokens the model can still write after ``prompt``.

    Raises:
        InvalidSetting: the prompt alone fills its context, or is empty and nothing can begin it.
    """
    used = _tokens(loaded, prompt).shape[1]
    limit = context_length(loaded.model)
    if limit is None:
        return None
    if loaded.model.config.is_encoder_decoder:
        used, room = used - 1, limit - 1  # the answer has positions of its own
    else:
        room = limit - used
    if used >= limit:
        raise InvalidSetting(
            f"a prompt of {used} tokens is too long for this model",
            cause=f"its context has {limit} tokens, and what is written needs some of them",
            hint="shorten the prompt, or choose a model with a longer context",
        )
    return room


def warm_up(loaded: LoadedModel, prompt: str, max_new_tokens: int) -> None:
    """Continues the prompt for nobody, so that no rate holds what happens only once.

    Kernels are loaded, chosen and compiled when they are first used, by some libraries once for
    each length of text. It ends with the token during which two seconds have passed.
    """
    import torch

    tokens, settings = _tokens(loaded, prompt), _settings(loaded.model, max_new_tokens, None)
    settings.max_time = _WARM_UP_SECONDS
    with torch.inference_mode():
        loaded.model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=settings
        )


def continue_text(
    loaded: LoadedModel,
    prompt: str,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    tell: Callable[[str], None] | None = None,
) -> Continuation:
    """Writes on after ``prompt``: the likeliest token each time, or a random one.

    Args:
        tell: given the text piece by piece, as it comes.

    Returns:
        the text without the prompt; seconds from the first step to the last token in memory.
    """
    import torch

    model = loaded.model
    tokens = _tokens(loaded, prompt)
    if sampling is not None:
        torch.manual_seed(sampling.seed)
    began = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=_settings(model, max_new_tokens, sampling),
            streamer=None if tell is None else _streamer(loaded.tokenizer, tell),
        )
        # Fetched before the clock is read: on a GPU, generate() returns before the last token is.
        written = output[0].tolist()
    seconds = time.perf_counter() - began
    # A decoder returns the prompt too; an encoder-decoder only what it wrote, after a start token.
    new = written[1 if model.config.is_encoder_decoder else tokens.shape[1] :]
    text = loaded.tokenizer.decode(new, skip_special_tokens=True)
    return Continuation(text, tokens.shape[1], len(new), seconds)


def _tokens(loaded: LoadedModel, prompt: str) -> Any:
    """The prompt as token ids (1, n) on the model's device."""
    import torch

    ids = loaded.tokenizer(prompt)["input_ids"] or _beginning(loaded.tokenizer)
    return torch.tensor([ids], device=loaded.model.device)


def _beginning(tokenizer: Any) -> list[int]:
    """What stands for an empty prompt: the token that texts begin with."""
    if tokenizer.bos_token_id is None:
        raise InvalidSetting(
            "an empty prompt cannot be continued",
            cause="this tokenizer has no token that begins a text",
            hint='--prompt "The"',
        )
    return [tokenizer.bos_token_id]


def _settings(model: Any, max_new_tokens: int, sampling: Sampling | None) -> Any:
    """The model's own generation settings (its end and padding tokens), decoded as asked.

    What a model's author recommends for sampling is left out: only what the command line says,
    and the result records, decides the text.
    """
    settings = copy.deepcopy(model.generation_config)
    settings.update(
        max_new_tokens=max_new_tokens,
        max_length=None,
        min_length=0,
        min_new_tokens=None,
        num_beams=1,
        do_sample=sampling is not None,
        temperature=None if sampling is None else sampling.temperature,
        top_p=None if sampling is None else sampling.top_p,
        top_k=None if sampling is None else 0,
    )
    if settings.pad_token_id is None:
        end = settings.eos_token_id
        settings.pad_token_id = end[0] if isinstance(end, list) else end
    return settings


def _streamer(tokenizer: Any, tell: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            tell(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
