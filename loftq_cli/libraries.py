"""Keeps the libraries that do the work from talking: no bars, no advice, no warnings."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any

_LIBRARIES = ("accelerate", "bitsandbytes", "huggingface_hub", "peft", "torch", "transformers")


def quiet_libraries() -> None:
    """For the rest of this process and in its children. To be called before they are imported."""
    for name, value in (
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),  # transformers' own bars follow it too
        ("HF_HUB_VERBOSITY", "error"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),  # else it warns at every fork
        ("DATASETS_VERBOSITY", "error"),
        ("TQDM_DISABLE", "1"),  # bars of lm-eval
    ):
        os.environ.setdefault(name, value)
    for library in ("bitsandbytes", "accelerate", "lm_eval", "peft", "torch"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # Appended, so that what `python -W` or a test runner asks for still comes first.
    warnings.simplefilter("ignore", append=True)


@contextmanager
def importing() -> Iterator[None]:
    """For a while, in which libraries are imported: Python looks for no garbage.

    They make a million objects, and next to no garbage. Every look goes through those that are
    there: a tenth of the time, or more.
    """
    looked = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looked:
            gc.enable()


def import_bitsandbytes() -> None:
    """Imports bitsandbytes without all of torch's compiler.

    On import it hands its fallbacks for other devices to `torch.compile`, which loads inductor for
    functions that are hardly ever called: a sixth of what a run does before its first weight. Here
    that happens when one of them is.
    """
    if "bitsandbytes" in sys.modules:
        return
    import torch

    compile_now = torch.compile

    def compile_late(function: Any = None, **options: Any) -> Any:
        if function is None:
            return partial(compile_late, **options)
        compiled = cache(lambda: compile_now(function, **options))
        return wraps(function)(lambda *given, **named: compiled()(*given, **named))

    torch.compile = compile_late
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile_now


@contextmanager
def quietly() -> Iterator[None]:
    """For a while, in a process that is somebody else's; then all is as it was before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging as bars

        loggers = [logging.getLogger(library) for library in _LIBRARIES]
        levels = [logger.level for logger in loggers]
        showed_bars = bars.is_progress_bar_enabled()
        bars.disable_progress_bar()  # those of huggingface_hub too
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if showed_bars:
                bars.enable_progress_bar()
