"""The step between the tasks and the commit that trains the adapters (`models.distillation`).

It begins with the adapters that lie beside the finished layers, so a run that was interrupted in it
keeps these and begins it anew, and ends in the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli import hardware, schema
from loftq_cli.checkpoint.adapter import lora_names
from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.checkpoint.tensors import tensor_memory
from loftq_cli.engines.estimates import distilling_bytes
from loftq_cli.engines.pipeline import Chunk
from loftq_cli.engines.placement import read_weight
from loftq_cli.engines.plan import Plan
from loftq_cli.engines.sequence import FinishedLayers, require_same_text
from loftq_cli.engines.settings import Settings
from loftq_cli.engines.tasks import LayerOutcome
from loftq_cli.errors import LoftqError, UnsupportedModel
from loftq_cli.models import distillation
from loftq_cli.models.dtypes import stored_dtype
from loftq_cli.models.evaluation import require_causal
from loftq_cli.models.source import read_config
from loftq_cli.record import Record
from loftq_cli.report import units

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.models.architecture import Architecture
    from loftq_cli.models.quantized_layers import QuantizedLayer


@dataclass(frozen=True)
class Distilled:
    """The adapters as they are to be written, and what the manifest keeps of how it went."""

    adapters: Mapping[str, tuple[Tensor, Tensor]]
    kept: dict[str, Any]

    def chunks(self) -> Iterator[Chunk]:
        for module, pair in self.adapters.items():
            for name, factor in zip(lora_names(module), pair, strict=True):
                yield name, tensor_memory(factor)


def require_distillable(plan: Plan, architecture: Architecture) -> None:
    """Refuses plans whose adapters are to be trained and cannot be.

    Raises:
        UnsupportedModel: it is no causal language model, or experts are quantized or have adapters.
    """
    if plan.settings.distill_steps is None:
        return
    try:
        require_causal(architecture)
    except UnsupportedModel as error:
        raise UnsupportedModel(
            f"--distill-steps is for causal language models, not for {architecture.class_name}",
            cause=error.cause,
            hint="leave --distill-steps out",
        ) from None
    if plan.stacks or any(planned.layer.expert for planned in plan.layers):
        raise UnsupportedModel(
            "--distill-steps does not work with quantized experts",
            cause="adapters are trained beside experts as they were, not beside their codes",
            hint="--experts keep, or leave --distill-steps out",
        )


def distill_adapters(
    plan: Plan,
    checkpoint: Checkpoint,
    architecture: Architecture,
    source: Path,
    directory: Path,
    text: Path,
    *,
    device: str,
    trust_remote_code: bool,
    record: Record,
) -> Distilled:
    """Trains the adapters of the layers in ``directory`` to follow the model in ``source``.

    Raises:
        LoftqError: the text is another by now, or what is predicted is no number, before or after.
    """
    import torch

    from loftq_cli.core.residual import left_by
    from loftq_cli.models.loading import LoadedModel, load_tokenizer, read_weights
    from loftq_cli.models.texts import digest, read_text, text_windows

    settings, began = plan.settings, time.perf_counter()
    steps, asked = settings.distill_steps, settings.calibration
    assert steps is not None
    assert asked is not None
    content = read_text(text)
    require_same_text(text, digest(content), asked)
    record.note(
        "distilling holds the model and its quantized weights: up to "
        f"{units.size(distilling_bytes(plan))}"
    )
    with record.timing("distill"), record.progress("distilling", steps) as progress:
        stored = stored_dtype(read_config(source))
        dtype = hardware.resolve_dtype(settings.dtype or "auto", device, stored, to_measure=True)
        if dtype.value == "float16":
            dtype = hardware.Choice("float32", "gradients this small are zero in float16")
        record.resolved("distill_dtype", *dtype)
        model = read_weights(source, architecture, dtype.value, device_map={"": device}).eval()
        loaded = LoadedModel(model, load_tokenizer(source, trust_remote_code), None)
        length = distillation.WINDOW_LENGTH
        windows = text_windows(loaded, content, str(text), asked.tokens, length)
        finished = FinishedLayers(settings, directory, device)
        for task in plan.tasks:
            for planned in task.layers:
                finished.lies_in(planned, task.file_name)
        ranks = {planned.layer.module: planned.rank for planned in plan.layers}
        done = distillation.distill(
            model,
            ((name, _without_padding(finished(name), rank)) for name, rank in ranks.items()),
            windows,
            steps=steps,
            seed=settings.seed,
            dtype=getattr(torch, settings.adapter_dtype),
            tell=progress.advance,
        )
        del model, loaded
        if not math.isfinite(done.kl_after):
            raise LoftqError(
                "the distillation came to no number",
                cause=f"the KL divergence on the text was {done.kl_before:g} before it",
                hint=distillation.WITHOUT,
            )
        gained = done.kl_after < done.kl_before
        adapters, errors = {}, {}
        for planned in plan.layers:
            if planned.adapted:
                module = planned.layer.module
                layer = finished(module)
                adapters[module] = A, B = _written(layer, done.adapters[module], trained=gained)
                W = read_weight(checkpoint, planned.layer, device)
                factors = B.to(W.device).double() * settings.scaling, A.to(W.device).double()
                errors[module], *_ = left_by(W, layer.Q, factors)
    if not gained:
        record.warn(
            "the distillation brought nothing nearer on the calibration text: the KL divergence "
            f"was {units.small(done.kl_before)} and came to {units.small(done.kl_after)}; the "
            "adapters are left as they were before it"
        )
    return Distilled(
        adapters,
        {
            "errors": errors,
            "distillation": {
                "steps": steps,
                "learning_rate": distillation.LEARNING_RATE,
                "batch": distillation.BATCH,
                "window_length": windows.shape[1],
                "tokens": windows.numel(),
                "kl_before": done.kl_before,
                "kl_after": min(done.kl_before, done.kl_after),
                "dtype": dtype.value,
                "seconds": time.perf_counter() - began,
            },
        },
    )


def told(
    settings: Settings, outcomes: list[LayerOutcome], kept: Any
) -> tuple[list[LayerOutcome], schema.Distillation | None, Any]:
    """What came out for the layers in the end, how the training went, and the experts' errors.

    ``outcomes`` are those before it, ``kept`` what the manifest has beside the adapter. The errors
    of outputs are those of the adapters before it, and nothing is said of them.
    """
    if settings.distill_steps is None:
        return outcomes, None, kept
    after = [
        replace(
            each,
            error=kept["errors"].get(each.name, each.error),
            output_error=None,
            quantized_only_output_error=None,
            output_norm=None,
        )
        for each in outcomes
    ]
    return after, schema.Distillation(**kept["distillation"]), None


def _without_padding(layer: QuantizedLayer, rank: int) -> QuantizedLayer:
    if layer.adapter is None:
        return layer
    A, B = layer.adapter
    return replace(layer, adapter=(A[:rank], B[:, :rank]))


def _written(
    layer: QuantizedLayer, made: tuple[Tensor, Tensor], *, trained: bool
) -> tuple[Tensor, Tensor]:
    """A and B as they lie in the file of this layer, with what was ``trained`` of them."""
    import torch

    assert layer.adapter is not None
    if not trained:
        return layer.adapter
    (old_A, old_B), (A, B), rank = layer.adapter, made, made[0].shape[0]
    return (
        torch.cat((A.to(old_A.dtype), old_A[rank:])),
        torch.cat((B.to(old_B.dtype), old_B[:, rank:]), dim=1),
    )
