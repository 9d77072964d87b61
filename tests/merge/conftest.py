"""Quantized directories, adapters that were trained on them, and what the two together compute."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.engines import shards
from loftq_cli.models.loading import load_model
from tests.battery import BATTERY
from tests.conftest import Outcome
from tests.verify.conftest import edit_json

Loftq = Callable[..., Outcome]


@dataclass(frozen=True)
class Trained:
    """A model of the battery, what `quantize` made of it, and an adapter that PEFT saved."""

    model: str
    source: Path
    base: Path
    adapter: Path

    def inputs(self) -> dict[str, torch.Tensor]:
        return BATTERY[self.model].inputs()

    def adapted(self, dtype: str = "float32") -> torch.Tensor:
        """Outputs of the quantized model with the trained adapter on it."""
        loaded = load_model(self.base, device="cpu", dtype=dtype, adapter=self.adapter)
        return logits(loaded.model, self.inputs())


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found.float()


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def train(base: Path, out: Path) -> Path:
    """As after a training that moved everything that an adapter trains; saved by PEFT."""
    model: Any = load_model(base, device="cpu", dtype="float32").model
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += noise * (0.3 * parameter.std() + 0.02)
    save(model, base, out)
    return out


def save(model: Any, base: Path, out: Path) -> None:
    """As the README in ``base`` has it: PEFT looks for the base when it saves."""
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(out)


def forget_base(adapter: Path) -> None:
    """As an adapter that was begun anew, which does not say what it is for."""
    edit_json(adapter / "adapter_config.json", lambda config: config.update(auto_mapping=None))


def make(
    loftq: Loftq,
    place: Path,
    model: str,
    *options: object,
    dtype: torch.dtype = torch.float32,
    file_bytes: int = 16 << 20,
) -> Trained:
    """Quantizes a model of the battery into `OUT`, and trains the adapter.

    It is one file unless ``file_bytes`` are fewer than it has.
    """
    source, base = place / "source", place / "OUT"
    BATTERY[model].build(dtype=dtype).save_pretrained(source)
    (source / "notes.txt").write_text("of mine")
    if "--init" not in options:
        options = (*options, "--iterations", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", file_bytes)
        done = loftq("quantize", "-m", source, "-o", base, "--rank", 4, *options)
    assert done.code == 0, done.err
    return Trained(model, source, base, train(base, place / "trained"))


@pytest.fixture(scope="session")
def whole(loftq: Loftq, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A Llama in bfloat16 and NF4, for those who only look."""
    return make(loftq, tmp_path_factory.mktemp("whole"), "llama", dtype=torch.bfloat16)


@pytest.fixture
def trained(whole: Trained, tmp_path: Path) -> Trained:
    """A copy of it to damage."""
    base = shutil.copytree(whole.base, tmp_path / "copy" / "OUT")
    adapter = shutil.copytree(whole.adapter, tmp_path / "copy" / "trained")
    return Trained(whole.model, whole.source, Path(base), Path(adapter))
