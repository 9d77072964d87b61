"""What FSDP makes of written directories: two processes of one thread each, gloo, on the CPU.

    python -m tests.training.sharded '[["DIR", "fsdp2", true], …]'

A job is a directory, a way to shard and PEFT's ``autocast_adapter_dtype``. JSON comes out: of each
process an object for each job. The ways are ``fsdp2``, which is what accelerate does for a Trainer,
``fsdp2-float16``, the same with mixed precision in float16, ``fsdp1`` with PEFT's policy, which
gives every A and B a unit of its own, and ``fsdp1-blocks``, without that.

accelerate itself turns FSDP off on a CPU, so what it calls is called here.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

import bitsandbytes  # noqa: F401 - before the fork, so that it is imported once
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

TOKENS = torch.arange(2 * 12).reshape(2, 12) % 80 + 4
RATE = 5.0


def load(directory: str, autocast: bool) -> Any:
    """As the directory's README has it."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    for layer in model.modules():
        layer.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(
        model,
        directory,
        subfolder="loftq_init",
        is_trainable=True,
        autocast_adapter_dtype=autocast,
    )


def shard(model: Any, way: str, rank: int) -> Any:
    if way.startswith("fsdp2"):
        half = MixedPrecisionPolicy(param_dtype=torch.float16)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
            mixed_precision_policy=half if way == "fsdp2-float16" else None,
        )
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            device=torch.device("cpu"),
            is_main_process=rank == 0,
            mixed_precision="no",
            torch_device_mesh=None,
        )
        return fsdp2_prepare_model(accelerator, model)
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = LlamaDecoderLayer.__name__
    blocks = ModuleWrapPolicy({LlamaDecoderLayer})
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model) if way == "fsdp1" else blocks,
        device_id=torch.device("cpu"),
        use_orig_params=way != "fsdp1",
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


def step(model: Any, tokens: torch.Tensor) -> None:
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=RATE)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def local_bytes(model: Any) -> int:
    """Of all parameters, as far as they are on this process."""
    local = (each.to_local() if hasattr(each, "to_local") else each for each in model.parameters())
    return sum(each.numel() * each.element_size() for each in local)


def codes(model: Any) -> list[torch.Tensor]:
    """The packed bytes of every layer, collected from both processes where they are spread."""
    found = []
    for name, parameter in model.named_parameters():
        if name.endswith(".base_layer.weight"):
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.data
            found.append(whole.view(torch.uint8).flatten())
    return found


def run(rank: int, directory: str, way: str, autocast: bool) -> dict[str, Any]:
    """One job on one of the two processes: each sees one of two sequences."""
    alone, model = load(directory, autocast), load(directory, autocast)
    packed, whole, before = codes(alone), local_bytes(alone), logits(alone)
    try:
        model = shard(model, way, rank)
    except ValueError as error:  # both processes come to the same end
        return {"refused": str(error)}
    said: dict[str, Any] = {"local": local_bytes(model) / whole, "codes_kept": None}
    if way == "fsdp2":  # FSDP 1 has no names for them
        kept = [torch.equal(*each) for each in zip(packed, codes(model), strict=True)]
        said["codes_kept"] = all(kept) and len(kept) > 0
    said["same_outputs"] = torch.equal(logits(model), before)
    if way == "fsdp2-float16":
        return said
    step(alone, TOKENS)
    step(model, TOKENS[rank : rank + 1])
    after = logits(alone)
    moved = float((after - before).norm())
    said["moved"] = moved / float(before.norm())
    said["deviation"] = float((logits(model) - after).norm()) / moved
    return said


def main(jobs: list[tuple[str, str, bool]]) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="loftq-sharded-") as place:
        child = os.fork()  # nothing has run yet, so there are no threads to lose
        rank = int(child == 0)
        dist.init_process_group(
            "gloo", init_method=f"file://{place}/store", rank=rank, world_size=2
        )
        found = [run(rank, *job) for job in jobs]
        everyone: list[Any] = [None, None]
        dist.all_gather_object(everyone, found)
        dist.destroy_process_group()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
    print(json.dumps(everyone))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
