"""The files in `examples/` for axolotl and LLaMA-Factory: what they name is what `quantize` writes,
and their keys are those of the two, where they are installed."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from loftq_cli.options import CompareOptions
from tests.conftest import Outcome

EXAMPLES = Path(__file__).parents[1] / "examples"
AXOLOTL = EXAMPLES / "axolotl.yaml"
LLAMAFACTORY = EXAMPLES / "llamafactory" / "wikitext.yaml"


def read(file: Path) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    found: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    return found


def quantize_line(file: Path) -> str:
    (line,) = re.findall(r"^#     (loftq quantize .*)$", file.read_text("utf-8"), re.M)
    return str(line)


@pytest.fixture(scope="module")
def written(loftq: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the line in these files makes of the built-in model, for want of the one in it."""
    assert quantize_line(AXOLOTL) == quantize_line(LLAMAFACTORY)
    there = tmp_path_factory.mktemp("written")
    words = shlex.split(quantize_line(AXOLOTL))[1:]
    words[words.index("--model") + 1] = "demo"
    at = words.index("--output") + 1
    words[at] = str(there / words[at])
    done = loftq(*words, "--init", "qlora")  # names and settings are those of any start
    assert done.code == 0, done.err
    return there


@pytest.mark.parametrize(
    ("file", "base", "adapter"),
    [
        (AXOLOTL, "base_model", "lora_model_dir"),
        (LLAMAFACTORY, "model_name_or_path", "adapter_name_or_path"),
    ],
)
def test_they_name_what_is_written(file: Path, base: str, adapter: str, written: Path) -> None:
    config = read(file)
    assert (written / config[base] / "config.json").is_file()
    settings = json.loads((written / config[adapter] / "adapter_config.json").read_text())
    for key, theirs in (("lora_r", "r"), ("lora_alpha",) * 2, ("lora_dropout",) * 2):
        assert config.get(key, settings[theirs]) == settings[theirs]
    # What would quantize once more, or begin with another adapter.
    forbidden = {"loftq_config", "peft", "peft_init_lora_weights", "quantization_bit"}
    assert not forbidden & config.keys()
    assert not config["output_dir"].startswith(config[base])


def test_the_lines_of_the_evaluation_name_them() -> None:
    text = (EXAMPLES / "EVALUATION.md").read_text("utf-8")
    assert text.count(quantize_line(AXOLOTL)) == 2
    for file in (AXOLOTL, LLAMAFACTORY):
        assert f"train examples/{file.relative_to(EXAMPLES)}\n" in text
        config = read(file)
        base = config.get("base_model", config.get("model_name_or_path"))
        assert f"pretrained={base},peft={config['output_dir']} " in text


def test_the_loftq_lines_of_the_evaluation_are_understood(loftq: Callable[..., Outcome]) -> None:
    text = (EXAMPLES / "EVALUATION.md").read_text("utf-8")
    for line in {*re.findall(r"^loftq quantize .*$", text, re.M)}:
        words = shlex.split(line)[1:]
        words[words.index("--model") + 1] = "demo"
        done = loftq(*words, "--dry-run")
        assert done.code == 0, done.err
    (line,) = re.findall(r"^loftq compare .*$", text, re.M)
    options = {each.name for each in fields(CompareOptions)}
    assert {each.replace("-", "_") for each in re.findall(r" --(\S+)", line)} <= options


def test_axolotl_has_these_keys() -> None:
    """Its schema passes over keys that it does not know."""
    schema = pytest.importorskip("axolotl.utils.schemas.config").AxolotlInputConfig
    config = read(AXOLOTL)
    assert config.keys() <= schema.model_fields.keys()
    checked = schema(**config)
    assert checked.lora_model_dir == "llama-loftq/loftq_init"
    assert checked.load_in_4bit is True


def test_llamafactory_has_these_keys() -> None:
    parser = pytest.importorskip("llamafactory.hparams.parser")
    without_gpu = {"bf16": False, "use_cpu": True}
    model, data, _, finetuning, _ = parser.get_train_args(read(LLAMAFACTORY) | without_gpu)
    assert model.adapter_name_or_path == ["llama-loftq/loftq_init"]
    assert model.quantization_bit is None
    assert (finetuning.finetuning_type, finetuning.stage) == ("lora", "pt")
    assert data.dataset == ["wikitext2"]
    datasets = json.loads((LLAMAFACTORY.parent / "dataset_info.json").read_text())
    assert data.dataset_dir == f"examples/{LLAMAFACTORY.parent.name}"
    assert "wikitext2" in datasets
