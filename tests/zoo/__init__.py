"""Small random models of every architecture that the results' table names.

The battery (`tests.battery`) is what single properties are tested on; here is breadth. How an entry
is quantized, loaded and judged is in `tests.zoo.proof`; `python -m tests.zoo` does it.
"""

from __future__ import annotations

from tests.battery import Entry
from tests.zoo.decoders import DECODERS
from tests.zoo.media import IMAGES, SOUNDS
from tests.zoo.mixtures import MIXTURES, RECURRENT
from tests.zoo.texts import ENCODERS, SEQUENCES

ZOO: dict[str, Entry] = {
    **DECODERS,
    **MIXTURES,
    **RECURRENT,
    **SEQUENCES,
    **ENCODERS,
    **IMAGES,
    **SOUNDS,
}

# What runs in float32 only, quantized or not.
ONLY_FLOAT32 = {"XLNet", "XLNet, classifier", "DeBERTa"}
# Adapters that no loss reaches, by a part of their names: the class does not use what these layers
# give, or these inputs have nothing for them.
UNREACHED = {
    "BART decoder": ".encoder_attn.",
    "BERT to BERT": "encoder.pooler.",
    "BigBird": "bert.pooler",
    "DeepSeek-V3.2": ".indexer.",  # it chooses tokens, which has no gradient
    "LED": "_global.",
    "LLaVA": "vision_tower.encoder.layers.1.",  # the last but one is what it looks at
    "LayoutLM, tokens": "layoutlm.pooler.",
    "Longformer": "_global.",
    "MusicGen, decoder": ".encoder_attn.",
    "NLLB-MoE": ".experts.",
    "Gemma 3, images": "vision_tower.head.",
    "PaliGemma": "vision_tower.head.",
    "SigLIP, classifier": "vision_model.head.",
    "Switch": ".experts.",
    "ViT to GPT-2": "encoder.pooler.",
}
