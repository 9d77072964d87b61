"""One model on this device: loading, counting and generating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.index import Checkpoint, open_checkpoint
from loftq_cli.checks.battery import Figures, Finding, NothingToCheck
from loftq_cli.containers.bitsandbytes4 import Bitsandbytes4
from loftq_cli.engines.plan import match_targets
from loftq_cli.errors import CheckFailed, UnsupportedModel
from loftq_cli.formats import ALL_LINEAR
from loftq_cli.models import costs
from loftq_cli.models.adapters import attach_fresh
from loftq_cli.models.architecture import Architecture, read_architecture
from loftq_cli.models.generation import Continuation, continue_text, warm_up
from loftq_cli.models.layers import LinearLayer
from loftq_cli.models.loading import LoadedModel, load_model, logical_parameters, require_text_model
from loftq_cli.models.outline import Outline, outline_of
from loftq_cli.models.presets import presets
from loftq_cli.models.source import read_config

RANKS = (4, 8, 16, 32, 64)
TARGETS = ("attention", "projection", "attention+projection")
_PROMPTS = ("def read_file(path):", "The quick brown fox")
_NEW_TOKENS = 24


@dataclass
class Subject:
    """The model that is checked. What the checks share is made when one first needs it."""

    directory: Path
    device: str
    dtype: str
    trust_remote_code: bool
    loaded: LoadedModel | None = field(default=None, init=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_config(self.directory)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.directory)

    @cached_property
    def outline(self) -> Outline:
        """From headers and config alone, as the torch-free commands see it."""
        return outline_of(self.checkpoint.infos, self.config)

    def on_meta(self) -> Architecture:
        """The model class anew, without memory: no adapter was ever on it."""
        return read_architecture(
            self.directory, self.config, trust_remote_code=self.trust_remote_code
        )


def load(subject: Subject) -> Finding:
    """Weights and tokenizer into memory, every parameter looked at."""
    import torch

    loaded = load_model(
        subject.directory,
        device=subject.device,
        dtype=subject.dtype,
        trust_remote_code=subject.trust_remote_code,
    )
    for name, parameter in loaded.model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CheckFailed(
                f"{name} holds NaN or infinity",
                cause="the weights are damaged, or too large for "
                f"{subject.dtype}, which they were loaded in",
                hint="download the model again, or try --dtype float32",
            )
    expected = sum(each.numel() for each in subject.on_meta().model.parameters())
    found = logical_parameters(loaded.model)
    if found != expected:
        raise CheckFailed(
            "the loaded model does not have the parameters of its class",
            cause=f"{expected:,} by the class, {found:,} in memory",
            hint="pip install -U transformers",
        )
    # A file may hold more than the class has a use for; nothing is wrong with either then.
    extra = subject.outline.parameters - found
    subject.loaded = loaded
    size = sum(parameter.nbytes for parameter in loaded.model.parameters())
    return Finding(
        f"{found:,} parameters in {subject.dtype}, all finite, {size / 1e6:,.1f} MB"
        + (f"; the files have {extra:+,}" if extra else ""),
        {"parameters": found, "parameter_bytes": size},
    )


def rank(subject: Subject, rank: int) -> Finding:
    """Adapter parameters of every linear layer at one rank, against PEFT's own count."""
    layers = _layers(subject)
    trainable = _agreed_count(subject, layers, (ALL_LINEAR,), rank)
    return Finding(
        f"{trainable:,} trainable parameters in {len(layers)} layers, as PEFT counts them",
        {"rank": rank, "modules": len(layers), "trainable_parameters": trainable},
    )


def targets(subject: Subject, name: str) -> Finding:
    """The same for one preset of target modules, by the names that a person would type."""
    found = {preset.name: preset for preset in presets(_layers(subject))}
    preset = found[name]
    if not preset.layers:
        raise NothingToCheck(f"no layer of this model belongs to {name}")
    trainable = _agreed_count(subject, preset.layers, preset.target_modules, 8)
    return Finding(
        f"{', '.join(preset.target_modules)}: {trainable:,} trainable parameters at rank 8, "
        "as PEFT counts them",
        {
            "target_modules": ",".join(preset.target_modules),
            "modules": len(preset.layers),
            "rank": 8,
            "trainable_parameters": trainable,
        },
    )


def efficiency(subject: Subject) -> Finding:
    """What each rank costs, and that PEFT's own adapter files are as large as foretold."""
    from peft import get_peft_model_state_dict

    layers, outline = _layers(subject), subject.outline
    rows = [_efficiency(outline, layers, rank) for rank in RANKS]
    architecture, modules = _chosen(subject, (ALL_LINEAR,))
    model = attach_fresh(architecture.model, RANKS[-1], None, modules, meta=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = sum(4 * tensor.numel() for tensor in state.values())  # it keeps adapters in float32
    if saved != rows[-1]["adapter_bytes"]:
        raise CheckFailed(
            "an adapter has another size than foretold",
            cause=f"{rows[-1]['adapter_bytes']:,} bytes at rank {RANKS[-1]} by the shapes, "
            f"{saved:,} in PEFT's tensors",
        )
    first, last = rows[0], rows[-1]
    return Finding(
        f"from {first['trainable_percent']:.3g} % at rank {RANKS[0]} "
        f"to {last['trainable_percent']:.3g} % at rank {RANKS[-1]}; sizes as PEFT saves them",
        {"base_parameters": outline.parameters},
        rows,
    )


def generation(subject: Subject) -> Finding:
    """Text from the model, and the same text with a new adapter, which starts at zero."""
    loaded = subject.loaded
    assert loaded is not None
    try:
        require_text_model(loaded)
    except UnsupportedModel as error:
        raise NothingToCheck(error.what) from None
    alone = _texts(loaded)
    architecture = subject.on_meta()
    adapted = LoadedModel(
        attach_fresh(loaded.model, 8, architecture.task_type).eval(), loaded.tokenizer, "new"
    )
    together = _texts(adapted)
    if [each.text for each in alone] != [each.text for each in together]:
        raise CheckFailed(
            "a new adapter changes the text",
            cause="its B is zero, so the model has to write what it writes without it; it wrote "
            f"{together[0].text[:40]!r} for {alone[0].text[:40]!r}",
            hint="pip install -U peft transformers",
        )
    if not all(each.new_tokens for each in alone):
        raise CheckFailed("the model writes nothing", cause="it ends every text at once")
    figures = {
        "new_tokens": sum(each.new_tokens for each in alone),
        "tokens_per_second": _rate(alone),
        "tokens_per_second_with_adapter": _rate(together),
    }
    return Finding(
        f"{figures['tokens_per_second']:.3g} tokens/s, "
        f"{figures['tokens_per_second_with_adapter']:.3g} with a rank-8 adapter; the same text",
        figures,
    )


def _layers(subject: Subject) -> list[LinearLayer]:
    """The layers that can be quantized and adapted, as the torch-free commands count them."""
    if not subject.outline.layers:
        raise NothingToCheck("no layer of this model can be quantized")
    return subject.outline.layers


def _chosen(subject: Subject, targets: Sequence[str]) -> tuple[Architecture, list[str]]:
    """A fresh model, and the paths of its modules that these targets choose.

    By the class and not by the files: transformers renames some checkpoints' modules.
    """
    architecture = subject.on_meta()
    inventory = architecture.inventory(subject.checkpoint.infos)
    return architecture, sorted(match_targets(inventory, targets))


def _agreed_count(
    subject: Subject, layers: Sequence[LinearLayer], targets: Sequence[str], rank: int
) -> int:
    """Our count of trainable parameters, once PEFT has come to the same on a fresh model."""
    ours = costs.trainable_parameters(layers, rank)
    architecture, modules = _chosen(subject, targets)
    model = attach_fresh(architecture.model, rank, None, modules, meta=True)
    theirs = sum(each.numel() for each in model.parameters() if each.requires_grad)
    if ours != theirs:
        raise CheckFailed(
            f"the count of trainable parameters at rank {rank} is wrong",
            cause=f"{ours:,} by the shapes in the files, {theirs:,} by PEFT on a fresh model",
            hint="please report it, with the model's config.json",
        )
    return ours


def _efficiency(outline: Outline, layers: Sequence[LinearLayer], rank: int) -> Figures:
    """One row: what the adapter is, and what fine-tuning on a 4-bit backbone takes."""
    trainable = costs.trainable_parameters(layers, rank)
    held = Bitsandbytes4("nf4", 64)
    return {
        "rank": rank,
        "trainable_parameters": trainable,
        "trainable_percent": 100 * trainable / (outline.parameters + trainable),
        "reduction_factor": outline.parameters / trainable,
        "adapter_bytes": 4 * trainable,
        "memory_bytes": costs.memory(
            outline, layers, rank, held=held, bits=4, tokens=512
        ).total_bytes,
    }


def _texts(loaded: LoadedModel) -> list[Continuation]:
    for prompt in _PROMPTS:
        warm_up(loaded, prompt, _NEW_TOKENS)
    return [continue_text(loaded, prompt, _NEW_TOKENS) for prompt in _PROMPTS]


def _rate(texts: Sequence[Continuation]) -> float:
    return sum(each.new_tokens for each in texts) / sum(each.seconds for each in texts)
