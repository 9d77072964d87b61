"""Calibrated starts in several processes: the bytes of one, whatever is killed."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest

import loftq_cli
from loftq_cli import quantize
from loftq_cli.engines.estimates import Machine, plan_memory
from loftq_cli.errors import LoftqError
from tests.battery import BATTERY, Entry
from tests.engines.conftest import Watching
from tests.quantize.test_killed import contents

DEMO = Path(loftq_cli.__file__).parent / "demo"
OPTIONS: dict[str, Any] = {"init": "calibrated", "rank": 4, "iterations": 1, "device": "cpu"}


pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loftq_cli.models.texts.LONGEST_WINDOW", 64)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text((DEMO / "calibration.txt").read_text("utf-8")[:6_000], "utf-8")
    return path


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With experts in its last block and a tokenizer; two of its three blocks share a file."""
    directory = tmp_path_factory.mktemp("spoken") / "source"
    entry = BATTERY["qwen2_moe"]
    more = {"num_hidden_layers": 3, "num_experts": 2, "mlp_only_layers": [0, 1]}
    config = {**entry.config, "vocab_size": 4096, **more}
    Entry(entry.model_class, entry.config_class, config).build().save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, directory)
    return directory


@pytest.mark.parametrize(
    ("order", "options"),
    [
        # With experts, whose second matrices wait for their first, and in the other blocks with
        # layers that make good what the residual stream has lost.
        ("sequential", {"container": "compressed-tensors", "block_size": 32}),
        ("parallel", {"adapter_dtype": "bfloat16", "target_modules": "q_proj,o_proj"}),
    ],
)
def test_two_write_what_one_writes_also_if_one_is_killed(
    order: Any,
    options: dict[str, Any],
    spoken: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loftq_cli.engines.shards.SHARD_BYTES", 30_000)

    def run(place: str, **more: Any) -> dict[str, bytes]:
        out = tmp_path / place / "out"
        asked = {**OPTIONS, **options, **more, "calibration_order": order}
        quantize(str(spoken), output=out, calibration_text=text, **asked)
        return contents(out)

    expected = run("one")
    assert sum(name.startswith("model-") for name in expected) > 2

    def kill() -> None:  # the one that the next task is given to
        (first,) = (each for each in multiprocessing.active_children() if each.name[-1] == "1")
        first.kill()

    heard = Watching(kill)
    assert run("two", workers=2, listener=heard) == expected
    assert any("killed by SIGKILL" in note for note in heard.notes)
    assert multiprocessing.active_children() == []


def test_what_breaks_in_the_model_is_told_as_it_is(
    spoken: Path, text: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(spoken, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight"] *= 1e30
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoftqError, match=r"model\.layers\.2"):
        quantize(str(broken), output=tmp_path / "out", calibration_text=text, workers=2, **OPTIONS)


def test_memory_of_the_model_is_counted_once() -> None:
    from loftq_cli.engines.settings import CalibrationText, Settings
    from tests.quantize.test_memory import plan

    calibrated = Settings(init="calibrated", calibration=CalibrationText("", 4096))
    large = plan((4096, 4096), (11008, 4096), settings=calibrated)
    one, two, three = (plan_memory(large, None, Machine(), workers=n) for n in (1, 2, 3))
    each = one.task_bytes
    assert three.peak_bytes - two.peak_bytes == each
    assert one.peak_bytes - each == pytest.approx(two.peak_bytes - 2 * each, abs=6e8)
