"""What tells a base from others: all that decides its codes and the start, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from loftq_cli.engines.fingerprint import base_identity
from loftq_cli.engines.settings import CalibrationText, Settings

MADE_FROM = {"loftq": "1", "source": {"model.safetensors": "sampled"}, "device": "cpu"}


def identity(made_from: dict[str, Any] | None = None, **settings: Any) -> str:
    chosen = Settings(**settings)
    return base_identity({**MADE_FROM, **(made_from or {}), "settings": chosen.as_dict()}, chosen)


def test_it_is_the_same_in_every_container_of_the_same_codes() -> None:
    assert identity(container_name="gptq") == identity(container_name="compressed-tensors")
    assert identity(container_name="gptq") != identity()
    assert identity(quant_storage="bfloat16") == identity()


@pytest.mark.parametrize("bits", [4, 8])
def test_other_codes_of_as_many_bits(bits: int) -> None:
    assert identity(bits=bits, container_name="gptq") != identity(bits=bits)


@pytest.mark.parametrize(
    "changed",
    [
        {"bits": 3},
        {"leading": (1, 3)},
        {"target_bits": 3.5},
        {"quant_type": "fp4"},
        {"block_size": 128},
        {"double_quant": True},
        {"init": "pissa"},
        {"rank": 8},
        {"rank_budget": True},
        {"iterations": 3},
        {"lora_alpha": 8},
        {"use_rslora": True},
        {"svd": "exact"},
        {"target_modules": ("q_proj",)},
        {"calibration": CalibrationText("sha256", 4096)},
        {"seed": 1},
        {"dtype": "float16"},
        {"adapter_dtype": "bfloat16"},
        {"made_from": {"loftq": "2"}},
        {"made_from": {"source": {"model.safetensors": "other"}}},
        {"made_from": {"tokenizer_sha256": {"tokenizer.json": "other"}}},
    ],
    ids=str,
)
def test_it_is_another_for_anything_that_decides_codes_or_start(changed: dict[str, Any]) -> None:
    assert identity(**changed) != identity()
