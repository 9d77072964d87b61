"""Small inputs that a model's `forward` takes, and labels, from its signature and its config.

Text; images, alone or in a text; audio; and a text to decode, where there is an encoder before it.
Nothing is downloaded: tokens are any of the vocabulary, images and sounds are noise.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import first_line
from loftq_cli.models.auto_classes import WRITES_TEXT

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TOKENS, _DECODED = 8, 5
_SOUNDS = ("input_values", "input_features")
# Frames of sound after the convolutions in front of a speech model.
_FRAMES = 24
# Of a waveform, where the config does not say what the convolutions make of it.
_SAMPLES = 16_000
# Where a config does not say how large images are: convolutions take any size.
_IMAGE_SIZE = 64

_ONE_LABEL = {
    "AutoModelForSequenceClassification", "AutoModelForImageClassification",
    "AutoModelForAudioClassification", "AutoModelForVideoClassification",
    "AutoModelForMultipleChoice", "AutoModelForNextSentencePrediction", "AutoModelForAudioXVector",
}  # fmt: skip
# A base model's decoder wants tokens too; a classifier makes its own from those of the encoder.
_DECODES = WRITES_TEXT | {"AutoModel", "AutoModelForPreTraining"}


class Unknown(Exception):
    """Nothing is known about such inputs; the message says what is asked for."""


@dataclass(frozen=True)
class Inputs:
    """What to call a model with.

    Attributes:
        tensors: by the names of forward's arguments; those of numbers are float32.
        labels: what makes forward give a loss; empty for a model that gives none.
        not_run: what of the model they leave out, and why.
    """

    tensors: dict[str, Tensor]
    labels: dict[str, Tensor]
    not_run: list[str] = field(default_factory=list)

    def on(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """All of them on the device, numbers in ``dtype``."""
        return {
            name: each.to(device, dtype if each.is_floating_point() else None)
            for name, each in {**self.tensors, **self.labels}.items()
        }


def inputs_of(model: Any, auto: str, *, images: bool = True) -> Inputs:
    """Inputs for a loaded model that the class ``auto`` opened.

    Without ``images`` a text has none in it, where the model can do without.

    Raises:
        Unknown: it takes something that is not text, an image or sound.
    """
    takes = set(inspect.signature(model.forward).parameters)
    main, config = model.main_input_name, model.config
    if main == "inputs" and hasattr(model, "encoder"):  # whatever its encoder takes
        main = model.encoder.main_input_name
    tensors: dict[str, Tensor] = {}
    not_run: list[str] = []
    if main not in takes or "past_time_features" in takes:
        raise Unknown(f"it asks for {main}")
    if main in _SOUNDS:
        tensors[main] = _noise(_sound_shape(config, main))
    elif main == "past_values":  # of a series
        tensors[main] = _noise((1, config.context_length, config.num_input_channels))
    elif main not in ("input_ids", "pixel_values"):
        raise Unknown(f"it asks for {main}")
    elif "input_ids" in takes:
        tensors = _text(config, _TOKENS)
        if auto == "AutoModelForMultipleChoice":
            tensors = {name: each.expand(2, -1)[None] for name, each in tensors.items()}
        elif config.model_type.startswith("musicgen"):  # where each codebook has a row
            tensors["input_ids"] = tensors["input_ids"].expand(config.num_codebooks, -1)
        if "pixel_values" in takes and (images or main == "pixel_values"):
            try:
                tensors = _with_image(model, takes, tensors)
            except Unknown as reason:
                if main == "pixel_values":
                    raise
                not_run.append(f"images ({reason})")
        if takes & {*_SOUNDS, "audio_values"}:
            not_run.append("sounds")
    else:
        frames = getattr(config, "num_frames", None)  # of a video
        one, *shape = _image_shape(config)
        tensors[main] = _noise((one, frames, *shape) if frames else (one, *shape))
    if "decoder_input_ids" in takes and auto in _DECODES and config.is_encoder_decoder:
        tensors["decoder_input_ids"] = _tokens(config, _DECODED)
    labels = _labels(config, takes, auto, tensors)
    if "labels" in takes and not labels:
        not_run.append("its loss (nothing is known about its labels)")
    return Inputs(tensors, labels, not_run)


def _text(config: Any, count: int) -> dict[str, Tensor]:
    import torch

    tokens = _tokens(config, count)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _tokens(config: Any, count: int) -> Tensor:
    """(1, count) ids that mean nothing special, but for an end where BART's classifiers look."""
    import torch

    sizes = [each.vocab_size for each in _configs(config) if _counts(each, "vocab_size")]
    vocabulary = min(sizes, default=128)  # characters, as for CANINE
    plain = sorted(set(range(min(vocabulary, 1000))) - _special(config)) or [0]
    tokens = torch.tensor([[plain[(7 * place + 3) % len(plain)] for place in range(count)]])
    end = _setting(config, "eos_token_id")
    if isinstance(end, int) and 0 <= end < vocabulary:
        tokens[0, -1] = end
    return tokens


def _special(config: Any) -> set[int]:
    """Ids that stand for something: an image, the padding, a start."""
    found: set[int] = set()
    for each in _configs(config):
        for name, value in vars(each).items():
            if name.endswith(("_token_id", "_token_index")):
                found |= {id for id in (value if isinstance(value, list) else [value]) if id}
    return found | {0}


def _labels(
    config: Any, takes: set[str], auto: str, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What training gives this kind of model; {} where that is not known."""
    import torch

    if {"start_positions", "end_positions"} <= takes:
        return {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([2])}
    if "labels" not in takes:
        return {}
    if auto in WRITES_TEXT or auto == "AutoModelForMaskedLM":
        written = tensors["decoder_input_ids" if "decoder_input_ids" in tensors else "input_ids"]
        special = torch.isin(written, torch.tensor(sorted(_special(config) - _ends(config))))
        return {"labels": written.masked_fill(special, -100)}
    if auto == "AutoModelForPreTraining" and "input_ids" in tensors:
        pairs = {"next_sentence_label", "sentence_order_label"} & takes
        zero = torch.zeros(1, dtype=torch.long)
        return {"labels": torch.zeros_like(tensors["input_ids"]), **dict.fromkeys(pairs, zero)}
    if auto == "AutoModelForCTC":
        return {"labels": _tokens(config, 4)[:, :3]}
    count = getattr(config, "num_labels", 2)
    if auto in _ONE_LABEL:
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            return {"labels": torch.zeros(1, count)}
        if problem == "regression" or (problem is None and count == 1):
            return {"labels": torch.zeros(1, count).squeeze(-1)}
        return {"labels": torch.zeros(1, dtype=torch.long)}
    if auto == "AutoModelForTokenClassification":
        return {"labels": torch.zeros(1, tensors["input_ids"].shape[-1], dtype=torch.long)}
    if auto == "AutoModelForSemanticSegmentation":
        return {"labels": torch.zeros(1, *tensors["pixel_values"].shape[-2:], dtype=torch.long)}
    return {}


def _ends(config: Any) -> set[int]:
    return {each.eos_token_id for each in _configs(config) if _counts(each, "eos_token_id")}


def _with_image(model: Any, takes: set[str], text: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text with an image in it, as many tokens long as the model makes of the image."""
    import torch

    token = _setting(model.config, "image_token_id") or _setting(model.config, "image_token_index")
    if not isinstance(token, int):
        return {**text, "pixel_values": _noise(_image_shape(model.config))}  # as for CLIP
    images, count = _image_and_length(model, takes)
    before, after = text["input_ids"][:, :2], text["input_ids"][:, 2:]
    tokens = torch.cat((before, torch.full((1, count), token), after), dim=1)
    kinds = (tokens == token).long()
    typed = {"mm_token_type_ids", "token_type_ids"} & takes
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        **dict.fromkeys(typed, kinds),
        **images,
    }


def _image_and_length(model: Any, takes: set[str]) -> tuple[dict[str, Tensor], int]:
    """An image in the form that the model takes, and how many tokens it makes of it."""
    import torch

    reasons: list[str] = []
    width = model.get_input_embeddings().weight.shape[-1]
    for images in _images(model.config, takes):
        given = {
            name: each.to(model.device, model.dtype if each.is_floating_point() else None)
            for name, each in images.items()
        }
        try:
            with torch.no_grad():
                found = model.get_image_features(**given)
            found = getattr(found, "pooler_output", found)
            parts = [found] if isinstance(found, torch.Tensor) else list(found)
            return images, sum(part.numel() for part in parts) // width
        except Exception as error:  # not the form that this model wants: whatever it says
            reasons.append(first_line(error))
    raise Unknown(reasons[0])


def _images(config: Any, takes: set[str]) -> Iterator[dict[str, Tensor]]:
    """The forms that vision-language models take one image in."""
    import torch

    vision = getattr(config, "vision_config", config)
    if "image_grid_thw" in takes:
        side = 2 * getattr(vision, "spatial_merge_size", 1)
        channels: int = getattr(vision, "in_channels", 0) or getattr(vision, "in_chans", 3)
        patch = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        yield {
            "pixel_values": _noise((side * side, patch)),
            "image_grid_thw": torch.tensor([[1, side, side]]),
        }
        return
    shape = _image_shape(config)
    sizes = {"image_sizes": torch.tensor([shape[-2:]])} if "image_sizes" in takes else {}
    forms: list[tuple[int, ...]] = [shape, (1, *shape)]
    if hasattr(config, "image_grid_pinpoints"):  # an image whole, and once more in tiles
        forms = [(1, 1 + tiles, *shape[1:]) for tiles in (1, 2, 4)]
    for form in forms:
        yield {"pixel_values": _noise(form), **sizes}
        if sizes:
            yield {"pixel_values": _noise(form)}


def _image_shape(config: Any) -> tuple[int, ...]:
    size = _setting(config, "image_size") or _setting(config, "input_size") or _IMAGE_SIZE
    size = list(size.values()) if isinstance(size, dict) else size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = _setting(config, "num_channels") or 3
    return (1, channels, height, width)


def _sound_shape(config: Any, main: str) -> tuple[int, ...]:
    strides = _setting(config, "conv_stride")
    if main == "input_values" and strides:
        return (1, math.prod(strides) * _FRAMES + sum(_setting(config, "conv_kernel") or ()))
    mels = _setting(config, "num_mel_bins")
    if main == "input_values":
        length = _setting(config, "max_length")
        return (1, length, mels) if mels and length else (1, _SAMPLES)
    if main == "input_features":
        channels = _setting(config, "input_feat_per_channel")
        if channels:
            return (1, 4 * _FRAMES, channels * (_setting(config, "input_channels") or 1))
        if width := _setting(config, "feature_projection_input_dim"):
            return (1, _FRAMES, width)
        if mels and (positions := _setting(config, "max_source_positions")):
            return (1, mels, 2 * positions)
        if mels:
            return (1, 8 * _FRAMES, mels)
    raise Unknown(f"its config does not say how long {main} are")


def _noise(shape: tuple[int, ...]) -> Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _configs(config: Any) -> Iterator[Any]:
    """A config and those inside it (text, vision, encoder, decoder), the outermost first."""
    yield config
    for each in vars(config).values():
        if hasattr(each, "model_type"):
            yield from _configs(each)


def _setting(config: Any, name: str) -> Any:
    """The first value that there is for it in the config or in one inside it."""
    values = (getattr(each, name, None) for each in _configs(config))
    return next((value for value in values if value is not None), None)


def _counts(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return isinstance(value, int) and value > 0
