"""What the README of an output says of training on several GPUs."""

from __future__ import annotations

import textwrap

from loftq_cli.formats import DEFAULT_STORAGE
from loftq_cli.schema import QuantizeResults

# As the parser of accelerate 1.15 takes it.
LAUNCH = """\
accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \\
    --fsdp_cpu_ram_efficient_loading false --fsdp_state_dict_type FULL_STATE_DICT \\
    --mixed_precision no --num_processes 2 train.py"""

_SHARDED = """\
FSDP shards the packed weights with all else, since they lie in {storage} tensors. `train.py` has
the lines of above after `from accelerate import PartialState; PartialState()`, which gives each
process a GPU of its own, and ends with `trainer.save_model("trained-adapter")`:"""

_ONE_DTYPE = """\
The codes are numbers in name only. Mixed precision in another dtype than {storage} converts them
all the same, and the outputs are wrong, in silence with some dtypes. What is not quantized has to
be in {storage} too (`loftq quantize --dtype {storage}`){adapter}."""

_ADAPTER_TOO = ", and for FSDP 1 so has the adapter (`--adapter-dtype {storage}`)"

_NOT_ON_GPUS = """\
Two processes on a CPU compute and train the same as one, with FSDP 1 and 2 (torch 2.13, accelerate
1.15). That was not run on GPUs."""


def sharded(results: QuantizeResults) -> list[str]:
    """A section, where codes lie in tensors that FSDP shards."""
    storage = results.settings.quant_storage
    if storage in (None, DEFAULT_STORAGE):
        return []
    same = storage == results.settings.adapter_dtype
    adapter = "" if same else _ADAPTER_TOO.format(storage=storage)
    return [
        "## Fine-tune on several GPUs",
        _filled(_SHARDED.format(storage=storage)),
        f"```sh\n{LAUNCH}\n```",
        _filled(_ONE_DTYPE.format(storage=storage, adapter=adapter)),
        _NOT_ON_GPUS,
    ]


def _filled(text: str) -> str:
    return textwrap.fill(
        " ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False
    )
