"""Write `loftq_cli/models/known.json`, the table of models that `loftq` knows without their files.

    python examples/known_models.py            (half a minute)

Every model is built on torch's meta device: shapes, no memory, no download. In the table are the
published models listed below, each with the parameter count that its publisher or the hub states,
so that a wrong config shows at once; and, under its model type, the default config of every causal
language model of the installed transformers that can be built from it.
"""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loftq_cli.checkpoint.safetensors import TensorInfo
from loftq_cli.models.architecture import Architecture
from loftq_cli.models.known import TABLE
from loftq_cli.models.layers import LinearLayer


class Published(NamedTuple):
    """A model as published: ``parameters`` is what its publisher or the hub counts."""

    ids: tuple[str, ...]
    config: transformers.PretrainedConfig
    parameters: int


def gpt2(width: int, layers: int, heads: int) -> transformers.GPT2Config:
    return transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=heads)


def decoder(kind: str, sizes: str, **settings: Any) -> transformers.PretrainedConfig:
    """Sizes in one line: width, feed-forward, layers, heads, key-value heads, vocabulary."""
    width, inner, layers, heads, kv_heads, vocabulary = map(int, sizes.split())
    return getattr(transformers, f"{kind}Config")(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        pad_token_id=None,
        **settings,
    )


def gemma3(text: str, head_dim: int = 256) -> transformers.PretrainedConfig:
    """A Gemma 3 that sees: its vision tower is the same at every size."""
    return transformers.Gemma3Config(
        text_config=decoder("Gemma3Text", text, head_dim=head_dim).to_dict(),
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
        architectures=["Gemma3ForConditionalGeneration"],
    )


def family(owner: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{owner}/{name}" for name in names)


TIED: dict[str, Any] = {"tie_word_embeddings": True}
WIDE_HEADS: dict[str, Any] = {"head_dim": 128}

PUBLISHED = {
    "gpt2": Published(("openai-community/gpt2",), gpt2(768, 12, 12), 124_439_808),
    "gpt2-medium": Published(("openai-community/gpt2-medium",), gpt2(1024, 24, 16), 354_823_168),
    "gpt2-large": Published(("openai-community/gpt2-large",), gpt2(1280, 36, 20), 774_030_080),
    "gpt2-xl": Published(("openai-community/gpt2-xl",), gpt2(1600, 48, 25), 1_557_611_200),
    "distilgpt2": Published(("distilbert/distilgpt2",), gpt2(768, 6, 12), 81_912_576),
    **{
        f"Llama-2-{size}": Published(
            family("meta-llama", f"Llama-2-{size}-hf", f"Llama-2-{size}-chat-hf"),
            decoder("Llama", sizes),
            parameters,
        )
        for size, sizes, parameters in (
            ("7b", "4096 11008 32 32 32 32000", 6_738_415_616),
            ("13b", "5120 13824 40 40 40 32000", 13_015_864_320),
            ("70b", "8192 28672 80 64 8 32000", 68_976_648_192),
        )
    },
    "Llama-3-8B": Published(
        family(
            "meta-llama",
            "Meta-Llama-3-8B",
            "Meta-Llama-3-8B-Instruct",
            "Meta-Llama-3.1-8B",
            "Meta-Llama-3.1-8B-Instruct",
            "Llama-3.1-8B",
            "Llama-3.1-8B-Instruct",
        ),
        decoder("Llama", "4096 14336 32 32 8 128256"),
        8_030_261_248,
    ),
    "Llama-3-70B": Published(
        family(
            "meta-llama",
            "Meta-Llama-3-70B",
            "Meta-Llama-3-70B-Instruct",
            "Meta-Llama-3.1-70B",
            "Meta-Llama-3.1-70B-Instruct",
            "Llama-3.1-70B",
            "Llama-3.1-70B-Instruct",
            "Llama-3.3-70B-Instruct",
        ),
        decoder("Llama", "8192 28672 80 64 8 128256"),
        70_553_706_496,
    ),
    "Llama-3.1-405B": Published(
        family(
            "meta-llama",
            "Meta-Llama-3.1-405B",
            "Meta-Llama-3.1-405B-Instruct",
            "Llama-3.1-405B",
            "Llama-3.1-405B-Instruct",
        ),
        decoder("Llama", "16384 53248 126 128 8 128256"),
        405_853_388_800,
    ),
    **{
        f"Llama-3.2-{size}": Published(
            family("meta-llama", f"Llama-3.2-{size}", f"Llama-3.2-{size}-Instruct"),
            decoder("Llama", sizes, **TIED),
            parameters,
        )
        for size, sizes, parameters in (
            ("1B", "2048 8192 16 32 8 128256", 1_235_814_400),
            ("3B", "3072 8192 28 24 8 128256", 3_212_749_824),
        )
    },
    "Mistral-7B-v0.1": Published(
        family("mistralai", "Mistral-7B-v0.1", "Mistral-7B-Instruct-v0.1"),
        decoder("Mistral", "4096 14336 32 32 8 32000"),
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": Published(
        family("mistralai", "Mistral-7B-v0.3", "Mistral-7B-Instruct-v0.3"),
        decoder("Mistral", "4096 14336 32 32 8 32768"),
        7_248_023_552,
    ),
    "Mistral-Nemo-2407": Published(
        family("mistralai", "Mistral-Nemo-Base-2407", "Mistral-Nemo-Instruct-2407"),
        decoder("Mistral", "5120 14336 40 32 8 131072", **WIDE_HEADS),
        12_247_782_400,
    ),
    **{
        f"Qwen2.5-{size}": Published(
            family("Qwen", f"Qwen2.5-{size}", f"Qwen2.5-{size}-Instruct"),
            decoder("Qwen2", sizes, **tied),
            parameters,
        )
        for size, sizes, tied, parameters in (
            ("0.5B", "896 4864 24 14 2 151936", TIED, 494_032_768),
            ("1.5B", "1536 8960 28 12 2 151936", TIED, 1_543_714_304),
            ("3B", "2048 11008 36 16 2 151936", TIED, 3_085_938_688),
            ("7B", "3584 18944 28 28 4 152064", {}, 7_615_616_512),
            ("14B", "5120 13824 48 40 8 152064", {}, 14_770_033_664),
            ("32B", "5120 27648 64 40 8 152064", {}, 32_763_876_352),
            ("72B", "8192 29568 80 64 8 152064", {}, 72_706_203_648),
        )
    },
    **{
        f"Qwen3-{size}": Published(
            family("Qwen", f"Qwen3-{size}", *([] if size == "32B" else [f"Qwen3-{size}-Base"])),
            decoder("Qwen3", sizes, **WIDE_HEADS, **tied),
            parameters,
        )
        for size, sizes, tied, parameters in (
            ("0.6B", "1024 3072 28 16 8 151936", TIED, 596_049_920),
            ("1.7B", "2048 6144 28 16 8 151936", TIED, 1_720_574_976),
            ("4B", "2560 9728 36 32 8 151936", TIED, 4_022_468_096),
            ("8B", "4096 12288 36 32 8 151936", {}, 8_190_735_360),
            ("14B", "5120 17408 40 40 8 151936", {}, 14_768_307_200),
            ("32B", "5120 25600 64 64 8 151936", {}, 32_762_123_264),
        )
    },
    **{
        f"gemma-{size}": Published(
            family("google", f"gemma-{size}", f"gemma-{size}-it"),
            decoder("Gemma", sizes, head_dim=256),
            parameters,
        )
        for size, sizes, parameters in (
            ("2b", "2048 16384 18 8 1 256000", 2_506_172_416),
            ("7b", "3072 24576 28 16 16 256000", 8_537_680_896),
        )
    },
    **{
        f"gemma-2-{size}": Published(
            family("google", f"gemma-2-{size}", f"gemma-2-{size}-it"),
            decoder("Gemma2", sizes, head_dim=head_dim),
            parameters,
        )
        for size, sizes, head_dim, parameters in (
            ("2b", "2304 9216 26 8 4 256000", 256, 2_614_341_888),
            ("9b", "3584 14336 42 16 8 256000", 256, 9_241_705_984),
            ("27b", "4608 36864 46 32 16 256000", 128, 27_227_128_320),
        )
    },
    **{
        f"gemma-3-{size}": Published(
            family("google", f"gemma-3-{size}-pt", f"gemma-3-{size}-it"), config, parameters
        )
        for size, config, parameters in (
            ("1b", decoder("Gemma3Text", "1152 6912 26 4 1 262144", head_dim=256), 999_885_952),
            ("4b", gemma3("2560 10240 34 8 4 262208"), 4_300_079_472),
            ("12b", gemma3("3840 15360 48 16 8 262208"), 12_187_325_040),
            ("27b", gemma3("5376 21504 62 32 16 262208", 128), 27_432_406_640),
        )
    },
    "gemma-3-270m": Published(
        family("google", "gemma-3-270m", "gemma-3-270m-it"),
        decoder("Gemma3Text", "640 2048 18 4 1 262144", head_dim=256),
        268_098_176,
    ),
    "phi-2": Published(
        family("microsoft", "phi-2"), decoder("Phi", "2560 10240 32 32 32 51200"), 2_779_683_840
    ),
    "Phi-3-mini": Published(
        family(
            "microsoft",
            "Phi-3-mini-4k-instruct",
            "Phi-3-mini-128k-instruct",
            "Phi-3.5-mini-instruct",
        ),
        decoder("Phi3", "3072 8192 32 32 32 32064"),
        3_821_079_552,
    ),
    "Phi-3-medium": Published(
        family("microsoft", "Phi-3-medium-4k-instruct", "Phi-3-medium-128k-instruct"),
        decoder("Phi3", "5120 17920 40 40 10 32064"),
        13_960_238_080,
    ),
    "phi-4": Published(
        family("microsoft", "phi-4"), decoder("Phi3", "5120 17920 40 40 10 100352"), 14_659_507_200
    ),
    "Phi-4-mini": Published(
        family("microsoft", "Phi-4-mini-instruct"),
        decoder("Phi3", "3072 8192 32 24 8 200064", **TIED),
        3_836_021_760,
    ),
}


def build(config: transformers.PretrainedConfig) -> PreTrainedModel:
    """The model class that belongs to the config, without memory."""
    named = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    with torch.device("meta"):
        return getattr(transformers, named[0])(config)


def default_models(
    model_types: Iterable[str] = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
) -> Iterator[tuple[str, PreTrainedModel]]:
    """Model types of causal language models, each in its default size, where that can be built."""
    for model_type in model_types:
        try:
            config = transformers.CONFIG_MAPPING[model_type]()
            config.architectures = None
            yield model_type, build(config)
        except Exception as error:  # whatever a default config may lack
            print(f"left out: {model_type} ({type(error).__name__})", file=sys.stderr)


def entry(model: PreTrainedModel, ids: Iterable[str], reasons: list[str]) -> dict[str, Any]:
    """What `loftq_cli.models.known` reads, from the model class itself."""
    infos, start = [], 0
    for name, parameter in model.named_parameters():
        end = start + 2 * parameter.numel()
        infos.append(TensorInfo(name, "BF16", tuple(parameter.shape), start, end))
        start = end
    inventory = Architecture(model).inventory(infos)
    layers: dict[tuple[str, int, int], list[str]] = {}
    left: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    vectors = [each for each in inventory.left if len(each.shape) < 2]
    for each in inventory.entries:
        if isinstance(each, LinearLayer):
            kind = (pattern(each.module), each.out_features, each.in_features)
            layers.setdefault(kind, []).append(each.module)
        elif len(each.shape) > 1:
            left.setdefault((pattern(each.tensor), each.shape, each.reason), []).append(each.tensor)
    reasons += sorted({reason for _, _, reason in left} - set(reasons))
    return {
        "ids": list(ids),
        "architecture": type(model).__name__,
        "context": context(model.config),
        "parameters": sum(info.elements for info in infos),
        "vectors": [len(vectors), sum(math.prod(vector.shape) for vector in vectors)],
        "layers": [
            [name, indices, out_features, in_features]
            for (_, out_features, in_features), names in layers.items()
            for name, indices in compressed(names)
        ],
        "left": [
            [name, indices, list(shape), reasons.index(reason)]
            for (_, shape, reason), names in left.items()
            for name, indices in compressed(names)
        ],
    }


def context(config: transformers.PretrainedConfig) -> int | None:
    """How many tokens the model can read at once, if its config says so."""
    tokens = getattr(config.get_text_config(), "max_position_embeddings", None)
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def pattern(name: str) -> str:
    """h.0.attn -> h.*.attn"""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def compressed(names: list[str]) -> Iterator[tuple[str, str]]:
    """[h.0.attn, h.1.attn, h.2.attn] -> (h.*.attn, "0-2"): what `known.expand` takes apart."""
    numbers = [[int(part) for part in name.split(".") if part.isdigit()] for name in names]
    return grids(pattern(names[0]), numbers)


def grids(shape: str, numbers: list[list[int]]) -> Iterator[tuple[str, str]]:
    """The index lists as full grids; where they are none, one for each value of the first star."""
    axes = [sorted(set(axis)) for axis in zip(*numbers, strict=True)]
    if math.prod(map(len, axes)) == len(numbers):
        yield shape, ";".join(map(ranges, axes))
        return
    for first in axes[0]:
        rest = [each[1:] for each in numbers if each[0] == first]
        yield from grids(shape.replace("*", str(first), 1), rest)


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5" """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)


def table() -> dict[str, Any]:
    reasons: list[str] = []
    models = {}
    for name, published in PUBLISHED.items():
        model = build(published.config)
        models[name] = entry(model, published.ids, reasons)
        counted = models[name]["parameters"]
        assert counted == published.parameters, f"{name}: {counted:,} {published.parameters:,}"
    for name, model in default_models():
        models.setdefault(name, entry(model, (), reasons))
    return {"transformers": transformers.__version__, "reasons": reasons, "models": models}


def written(data: dict[str, Any]) -> str:
    """The table as JSON with one model a line."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(each, separators=(',', ':'))}"
        for name, each in data["models"].items()
    ]
    head = json.dumps({key: value for key, value in data.items() if key != "models"})
    return head[:-1] + ', "models": {\n' + ",\n".join(lines) + "\n}}\n"


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    TABLE.write_text(written(table()), "utf-8")


if __name__ == "__main__":
    main()
