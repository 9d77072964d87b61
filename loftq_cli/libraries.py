"""Keeps the libraries that do the work from talking: no bars, no advice, no warnings."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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
