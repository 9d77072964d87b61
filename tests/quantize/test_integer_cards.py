"""The READMEs of integer containers: their code runs as it stands, where its libraries are."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loftq_cli import schema
from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.containers.base import Container, Weight
from loftq_cli.containers.compressed_tensors import CompressedTensors
from loftq_cli.containers.gptq import Gptq
from loftq_cli.models.spec import DEMO_DIRECTORY
from loftq_cli.report.card import card
from loftq_cli.report.integer_card import REQUIREMENTS
from loftq_cli.report.quantize import quantize_view
from loftq_cli.report.tables import Code
from tests.cli import documents
from tests.conftest import Outcome

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # gptqmodel compiles its kernel, for half a minute

Loftq = Callable[..., Outcome]
CONTAINERS = ("gptq", "compressed-tensors")
TOKENS = torch.arange(20)[None] + 5
MODULES = ("self_attn.q_proj", "mlp.down_proj")


def document(container: str, *, bits: tuple[int, ...] = (4,), **changes: Any) -> Any:
    """Of a sample run in integers; ``bits`` go to its layers in turns."""
    known = {key: changes.pop(key) for key in list(changes) if key in ("block_size", "rslora")}
    data = documents.integers(container, **{"bits": bits[0], "block_size": 64, **known})
    results = data["results"]
    for number, layer in enumerate(results["layers"]):
        layer |= {"bits": bits[number % len(bits)], "rank": changes.get("rank", 16)}
    results |= {key: value for key, value in changes.items() if key != "rank"}
    return schema.document_of(data)


def text_of(container: str, **changes: Any) -> str:
    return " ".join(card(document(container, **changes)).split())


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_and_blocks_are_named(container: str, bits: int) -> None:
    assert f"in int{bits} (blocks of 64)" in text_of(container, bits=(bits,))
    whole = text_of(container, bits=(bits,), block_size=-1)
    assert f"in int{bits} (whole rows)" in whole
    for text in (whole, text_of(container, bits=(bits,))):
        for other in ("blocks of -1", "bitsandbytes", "bnb", "double quant", "activations"):
            assert other not in text


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_it_asks_pip_for_is_our_extra(container: str) -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (extra,) = re.findall(rf"^{container} = \[(.*?)\]", project, flags=re.MULTILINE)
    assert re.findall(r'"(.*?)"', extra) == [*REQUIREMENTS[container]]
    text = text_of(container)
    assert all(f'"{each}"' in text for each in REQUIREMENTS[container])
    assert ('"torch==$torch"' in text) == (container == "gptq")


@pytest.mark.parametrize(
    ("container", "bits", "option"),
    [
        ("gptq", (4,), False),
        ("gptq", (8,), False),
        ("gptq", (3,), True),
        ("gptq", (8, 2), True),
        ("compressed-tensors", (2,), False),
        ("compressed-tensors", (8, 4), False),
    ],
)
def test_the_line_for_vllm(container: str, bits: tuple[int, ...], option: bool) -> None:
    text = text_of(container, bits=bits, rank=9)
    line = (
        "vllm serve gpt2-loftq --enable-lora --lora-modules tuned=gpt2-loftq/loftq_init "
        "--max-lora-rank 16"
    )
    assert f"{line}{' --quantization humming' if option else ''} ```" in text
    assert "and not run here" in text
    assert ("Humming" in text) == bool(set(bits) - {4, 8})
    assert ("of others nothing is known here" in text) == bool(set(bits) - {4, 8})


def test_no_line_for_a_rank_that_vllm_refuses() -> None:
    text = text_of("gptq", rank=513)
    assert "vllm serve" not in text
    assert "no adapter of a rank above 512" in text


def test_sglang_is_told_apart_from_ranks_that_it_would_mis_scale() -> None:
    assert "SGLang ignores" not in text_of("gptq")
    assert "SGLang ignores rsLoRA, and would scale" in text_of("gptq", rslora=True)


def test_several_widths_are_for_servers_or_for_gptqmodel() -> None:
    text = card(document("compressed-tensors", bits=(8, 2)))
    assert python_blocks(text) == []
    assert "loftq export gpt2-loftq --container gptq" in text
    load, *others = python_blocks(card(document("gptq", bits=(8, 2))))
    assert "GPTQModel.load(str(here), backend=BACKEND.GPTQ_TORCH)" in load
    assert not any("merge" in each or "ForSequence" in each for each in others)


def test_gpt2_in_gptq_is_for_gptqmodel() -> None:
    text = text_of("gptq", conv1d=["c_attn"])
    assert "transformers itself does not load this directory: classes with Conv1D" in text
    assert "compressed-tensors, where it would, does not hold Conv1D layers" in text
    assert "merge_and_unload" not in text


@pytest.mark.parametrize(
    ("container", "line"),
    [
        ("gptq", 'quantization = GPTQConfig(bits=3, backend="torch")'),
        ("compressed-tensors", "quantization = CompressedTensorsConfig(dequantize=True)"),
    ],
)
def test_the_page_of_quantize_has_the_same_lines(container: str, line: str) -> None:
    def lines(bits: tuple[int, ...]) -> Sequence[str]:
        sections = quantize_view(document(container, bits=bits)).sections
        (code,) = (each for each in sections if isinstance(each, Code))
        return code.lines

    assert line in lines((3,))
    assert "pip install" in "\n".join(lines((3,)))
    expected = "GPTQModel.load(" if container == "gptq" else "loftq export gpt2-loftq"
    assert any(expected in each for each in lines((8, 2)))


# --- run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small one with the demo's tokenizer."""
    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DIRECTORY / name, directory)
    return directory


def written(loftq: Loftq, source: Path | str, container: str, bits: str | int) -> list[str]:
    """Python of the README of `out`, here."""
    done = loftq("quantize", "-m", source, "-o", "out", "--container", container, "--bits", bits,
                 "--rank", 4, "--iterations", 1, "--init", "pissa", "--lora-alpha", 16)  # fmt: skip
    assert done.code == 0, done.err
    return python_blocks(Path("out/README.md").read_text())


def used(blocks: list[str], **names: Any) -> dict[str, Any]:
    """What the blocks make, with an evaluation between training and its start."""
    load, train, *rest = blocks
    names |= {"text": "def main():\n    return 0\n"}
    names["train_dataset"] = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 4
    exec(load, names)
    model = names["model"]
    with torch.no_grad():
        names["before"] = model.eval()(input_ids=TOKENS).logits.float()
    started = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    exec(train.replace('"runs", ', '"runs", report_to=[], use_cpu=True, '), names)
    moved = [not torch.equal(model.get_parameter(name), p) for name, p in started.items()]
    assert moved
    assert all(moved)
    for block in rest:
        exec(block, names)
    assert 0 < float(names["loss"].detach()) < 30
    return names


@pytest.mark.parametrize(("container", "other"), [CONTAINERS, CONTAINERS[::-1]])
def test_the_other_container_is_a_line_away(
    container: str, other: str, llama: Path, tmp_path: Path, loftq: Loftq,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    written(loftq, llama, container, 3)
    (line,) = re.findall(r"^loftq (export .*)$", Path("out/README.md").read_text(), re.MULTILINE)
    done = loftq(*shlex.split(line))
    assert done.code == 0, done.err
    text = Path("OUT/README.md").read_text()
    assert f'"{REQUIREMENTS[other][0]}"' in text
    assert 'here = Path("OUT")' in text
    assert f"loftq export OUT --container {container}" in text


def stored(container: Container, module: str, shape: tuple[int, int], bits: int) -> torch.Tensor:
    weight = Weight(f"{module}.weight", module, shape, bits, "BF16")
    return container.runtime(container.read(open_checkpoint(Path("out")).tensors, weight, "cpu"))


def check_classifier(names: dict[str, Any]) -> None:
    """A fresh head on the same layers, with the adapters that they start with."""
    classifier = names["classifier"]
    classifier(input_ids=TOKENS, labels=torch.tensor([1])).loss.backward()
    for module in MODULES:
        name = f"model.layers.1.{module}"
        layer = classifier.get_base_model().get_submodule(name)
        state = names["state"][f"base_model.model.{name}.lora_A.weight"]
        assert torch.equal(layer.lora_A["default"].weight, state)
        assert layer.lora_A["default"].weight.grad is not None


@pytest.mark.filterwarnings("default")  # theirs
@pytest.mark.parametrize("bits", [2, 4])
def test_everything_runs_on_compressed_tensors(
    bits: int, llama: Path, tmp_path: Path, loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors")
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(tmp_path)
    blocks = written(loftq, llama, "compressed-tensors", bits)
    assert len(blocks) == 5
    names = used(blocks)
    check_classifier(names)
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert not hasattr(merged.config, "quantization_config")
    for module in MODULES:
        name = f"model.layers.1.{module}"
        layer = names["model"].get_base_model().get_submodule(name)
        A, B = (each["default"].weight.detach().double() for each in (layer.lora_A, layer.lora_B))
        Q = stored(CompressedTensors("int", 64), name, tuple(layer.base_layer.weight.shape), bits)
        assert torch.equal(layer.base_layer.weight, Q)
        expected = Q.double() + 4 * B @ A  # lora_alpha 16, rank 4
        found = merged.get_submodule(name).weight.double()
        assert float((found - expected).abs().max() / expected.abs().max()) < 2**-7
    again = AutoPeftModelForCausalLM.from_pretrained(
        "trained-adapter", quantization_config=names["quantization"]
    )
    with torch.no_grad():
        expected = names["model"].eval()(input_ids=TOKENS).logits
        assert torch.equal(again.eval()(input_ids=TOKENS).logits, expected)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("bits", [3, 4])
def test_everything_runs_on_gptq(
    bits: int, llama: Path, tmp_path: Path, loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    monkeypatch.chdir(tmp_path)
    blocks = written(loftq, llama, "gptq", bits)
    assert len(blocks) == 4  # PEFT merges nothing there, and the README says where it does
    names = used(blocks)
    check_classifier(names)
    model = names["model"]
    assert {type(each.base_layer).__name__ for each in model.modules() if hasattr(each, "lora_A")
            } == {"TorchLinear"}  # fmt: skip
    again = AutoPeftModelForCausalLM.from_pretrained(
        "trained-adapter", quantization_config=names["quantization"]
    )
    with torch.no_grad():
        expected = model.eval()(input_ids=TOKENS).logits
        assert torch.equal(again.eval()(input_ids=TOKENS).logits, expected)
    # What the text says of it.
    with pytest.raises(ValueError, match="Cannot merge LORA layers"):
        model.merge_and_unload()
    plain = AutoModelForCausalLM.from_pretrained("out", quantization_config=names["quantization"])
    with pytest.raises(ValueError, match="No `target_modules` passed"):
        get_peft_model(plain, LoraConfig(target_modules="all-linear"))


@pytest.mark.filterwarnings("default")
def test_the_kernel_that_gptqmodel_picks_on_a_cpu_trains_wrongly(
    llama: Path, tmp_path: Path, loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the README names another; to be told that it need not when this fails."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    monkeypatch.chdir(tmp_path)
    load, *_ = written(loftq, llama, "gptq", 4)
    found = []
    for backend in ("torch", "auto", "auto_trainable"):
        names: dict[str, Any] = {}
        exec(load.replace('"torch"', f'"{backend}"'), names)
        model = names["model"].eval()
        with torch.no_grad():
            model(input_ids=TOKENS)
        model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        parts = [p.grad.flatten() for name, p in model.named_parameters() if "layers.0" in name
                 and "lora_" in name]  # fmt: skip
        found.append(torch.cat(parts))
    right, *wrong = found
    assert all((each - right).norm() > 0.1 * right.norm() for each in wrong)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["Conv1D", "mixed"])
def test_gptqmodel_loads_and_trains_what_transformers_does_not(
    kind: str, llama: Path, tmp_path: Path, loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gptqmodel")
    from peft import PeftModel

    monkeypatch.chdir(tmp_path)
    source, bits = (DEMO_DIRECTORY, "3") if kind == "Conv1D" else (llama, "8x1,2")
    blocks = written(loftq, source, "gptq", bits)
    assert len(blocks) == 3
    names = used(blocks)
    # The model with Q for W, and the same adapter on it.
    plain = AutoModelForCausalLM.from_pretrained(source)
    for name, module in plain.named_modules():
        if f"{name}.qweight" in open_checkpoint(Path("out")).tensors:
            turned = kind == "Conv1D"
            shape = tuple(module.weight.shape)[:: -1 if turned else 1]
            width = 3 if turned else 8 if "layers.0" in name else 2
            Q = stored(Gptq("int", 64), name, shape, width)
            module.weight.data = Q.T.contiguous() if turned else Q
    with torch.no_grad():
        alone = plain(input_ids=TOKENS).logits.float()
        model = PeftModel.from_pretrained(plain, "out", subfolder="loftq_init").eval()
        expected = model(input_ids=TOKENS).logits.float()
    error = float((names["before"] - expected).norm() / expected.norm())
    assert error < 2 * torch.finfo(torch.bfloat16).eps
    assert error < 0.1 * float((alone - expected).norm() / expected.norm())
    assert AutoTokenizer.from_pretrained("out")
