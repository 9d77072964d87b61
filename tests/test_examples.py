"""The scripts in `examples/`, run as a user runs them: what they train gets better."""

from __future__ import annotations

import json
import os
import random
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import pytest
import torch

from loftq_cli.checkpoint.adapter import base_of
from loftq_cli.checkpoint.index import load_json
from loftq_cli.models.spec import DEMO_DIRECTORY
from tests.conftest import Outcome
from tests.forks import Forked

Loftq = Callable[..., Outcome]
EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments: object, beside: Path) -> str:
    """What the script printed last."""
    done = Forked(beside, as_main, EXAMPLES / script, list(map(str, arguments)), beside)
    assert done.wait(300) == 0, done.err
    return done.out.splitlines()[-1]


def as_main(script: Path, arguments: list[str], directory: Path) -> None:
    os.chdir(directory)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def change(line: str) -> tuple[float, float]:
    before, after = re.findall(r"(\d\.\d+)", line)[:2]
    return float(before), float(after)


@pytest.fixture(scope="module")
def quantized(loftq: Loftq, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo at two bits, where there is most to gain; in float32, as CPUs like it."""
    out = tmp_path_factory.mktemp("examples") / "demo-loftq"
    done = loftq("quantize", "-o", out, "--bits", 2, "--rank", 8, "--iterations", 1,
                 "--dtype", "float32")  # fmt: skip
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    """Other text than the demo was trained on, to train on and to evaluate on."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "train.txt").write_text((DEMO_DIRECTORY / "calibration.txt").read_text()[:60_000])
    (folder / "held-out.txt").write_text((DEMO_DIRECTORY / "heldout.txt").read_text()[:8_000])
    return folder / "train.txt", folder / "held-out.txt"


def test_trainer(quantized: Path, texts: Sequence[Path], tmp_path: Path) -> None:
    train, heldout = texts
    said = run("finetune.py", quantized, "--text", train, "--held-out", heldout, "-o", tmp_path,
               "--steps", 15, "--batch", 4, "--learning-rate", 1e-3,
               beside=tmp_path)  # fmt: skip
    before, after = change(said)
    assert after < before - 0.03, said
    # What it was trained on is still told by what was saved.
    saved, start = (
        load_json(each / "adapter_config.json") for each in (tmp_path, quantized / "loftq_init")
    )
    assert base_of(saved) == base_of(start) is not None


def test_merging_and_reloading(quantized: Path, texts: Sequence[Path], tmp_path: Path) -> None:
    train, heldout = texts
    said = run("merge_and_reload.py", quantized, "--text", train, "--held-out", heldout,
               "-o", "out", "--steps", 15, "--batch", 4, "--learning-rate", 1e-3,
               beside=tmp_path)  # fmt: skip
    before, after, merged = map(float, re.findall(r"\d\.\d+", said))
    assert after < before - 0.03, said
    assert abs(merged - after) < 2e-4, said  # of what is printed with four digits
    kept = json.loads((tmp_path / "out" / "merged" / "config.json").read_text())
    assert "quantization_config" not in kept


def test_sft_trainer_from_the_directorys_name(
    quantized: Path, texts: Sequence[Path], tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    files = []
    for text in texts:
        pieces = [each for each in text.read_text().split("\n\n\n") if len(each) > 200]
        file = tmp_path / f"{text.stem}.jsonl"
        file.write_text("".join(json.dumps({"text": each}) + "\n" for each in pieces))
        files.append(file)
    said = run("finetune_sft.py", quantized, "--data", files[0], "--held-out", files[1],
               "-o", tmp_path / "out", "--steps", 15, "--batch", 4, "--learning-rate", 1e-3,
               beside=quantized.parent)  # fmt: skip
    before, after = change(said)
    assert after < before - 0.03, said
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_classification(loftq: Loftq, tmp_path: Path) -> None:
    """Which of two words is in a sentence: a random BERT can be taught that much."""
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(DEMO_DIRECTORY / "tokenizer.json"))
    )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    torch.manual_seed(0)
    source = tmp_path / "bert"
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 3  # so that words make a difference
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    chosen = random.Random(0)
    for name, count in (("train", 200), ("dev", 60)):
        lines = []
        for _ in range(count):
            label = chosen.choice(("raise", "yield"))
            words = [chosen.choice(("self", "name", "value", "list")) for _ in range(3)]
            words.insert(chosen.randrange(4), label)
            lines.append(f"{label}\t{' '.join(words)}\n")
        (tmp_path / f"{name}.tsv").write_text("".join(lines))
    out = tmp_path / "bert-loftq"
    done = loftq("quantize", "-m", source, "-o", out, "--rank", 8, "--iterations", 1)
    assert done.code == 0, done.err
    said = run("classify.py", out, "--data", tmp_path / "train.tsv", "--held-out",
               tmp_path / "dev.tsv", "-o", tmp_path / "trained", "--steps", 40,
               "--learning-rate", 1e-2, beside=tmp_path)  # fmt: skip
    before, after = change(said)
    assert before < 0.75
    assert after > 0.9, said


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llama-7b", 6_738_415_616),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("deepseek-v3", 671_026_404_352 + 58 * 256),  # what corrects its routers is no parameter
    ],
)
def test_shapes_are_those_that_were_published(shape: str, parameters: int) -> None:
    found = runpy.run_path(str(EXAMPLES / "make_checkpoint.py"))
    planned = list(found["decoder_tensors"](found["CONFIGS"][shape]))
    assert sum(prod(each.shape) for each in planned) == parameters
    assert len({each.name for each in planned}) == len(planned)
