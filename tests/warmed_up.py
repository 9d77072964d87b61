"""Imported by the process that others are forked from: one whole run, so that theirs are short.

It has imported the libraries, read the compiled loops from their cache and asked transformers for
all it knows. One thread, since others would not be there after a fork.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers

from loftq_cli import quantize
from loftq_cli.libraries import quiet_libraries
from tests.battery import BATTERY

quiet_libraries()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
with TemporaryDirectory() as _place:
    _source = Path(_place) / "source"
    BATTERY["llama"].build(dtype=torch.bfloat16).save_pretrained(_source)
    quantize(str(_source), output=Path(_place) / "out", rank=4, iterations=1)
