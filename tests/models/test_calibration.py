"""Second moments of layers' inputs, against float64 XᵀX of what an ordinary forward is given."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import loftq_cli
from loftq_cli.errors import CorruptCheckpoint, InvalidSetting, LoftqError, UnsupportedModel
from loftq_cli.models import calibration, layerwise, texts
from loftq_cli.models.architecture import read_architecture
from loftq_cli.models.calibration import Calibration, open_calibration
from loftq_cli.models.loading import LoadedModel
from loftq_cli.models.source import read_config
from loftq_cli.models.texts import text_windows
from tests.battery import BATTERY, Entry

DEMO = Path(loftq_cli.__file__).parent / "demo"
VOCABULARY = 4096  # of the demo model's tokenizer
TOKENS = 1200
WINDOW = 64
BATCH = 4  # windows

# Blocks that are one block, run again and again.
ALBERT = Entry(
    "AlbertModel",
    "AlbertConfig",
    {
        "hidden_size": 64,
        "embedding_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
)
ROBERTA = Entry(
    "RobertaForMaskedLM",
    "RobertaConfig",
    {**BATTERY["bert"].config, "max_position_embeddings": WINDOW + 2, "pad_token_id": 1},
)
ENTRIES = {**BATTERY, "albert": ALBERT, "roberta": ROBERTA}
MODELS = ["gpt2", "llama", "gemma2", "opt", "t5", "bert", "deberta_v2", "roberta", "mixtral"]
MODELS += (WHOLE := ["albert"])  # which cannot be run block by block


def is_staged(found: Calibration) -> bool:
    return len(found._staged.stages) > 1


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LONGEST_WINDOW", WINDOW)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((DEMO / "heldout.txt").read_text("utf-8")[:10_000], "utf-8")
    return path


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a random model of this name, with a tokenizer."""
    root = tmp_path_factory.mktemp("models")

    def save(name: str) -> Path:
        directory = root / name
        if not directory.exists():
            entry = ENTRIES[name]
            config = {**entry.config, "vocab_size": VOCABULARY}
            if name == "gemma2":
                config |= {"num_hidden_layers": 4, "sliding_window": 8}
            if name == "deberta_v2":
                config |= {"share_att_key": True}
            Entry(entry.model_class, entry.config_class, config).build().save_pretrained(directory)
            add_tokenizer(directory)
        return directory

    return save


def add_tokenizer(directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, directory)


def linear_modules(model: nn.Module) -> list[str]:
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]


def ordinary(directory: Path, text: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """XᵀX/n of every linear module in float64, batch after batch through the whole model."""
    config = json.loads((directory / "config.json").read_text("utf-8"))
    model = getattr(transformers, config["architectures"][0]).from_pretrained(directory)
    model.eval().config.use_cache = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: Any, args: Any, kwargs: Any) -> None:
            x = (args or tuple(kwargs.values()))[0]
            x = x.reshape(-1, x.shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return see

    for name in linear_modules(model):
        model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
    windows = text_windows(LoadedModel(model, tokenizer, None), text.read_text("utf-8"), "", TOKENS)
    if config["model_type"] == "roberta":
        windows = windows[:, :WINDOW]
    with torch.no_grad():
        # In batches, as DeBERTa looks at its relative positions once a batch.
        for batch in windows.split(BATCH):
            inputs = {"input_ids": batch}
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = batch
            model(**inputs)
    return {name: total / counts[name] for name, total in sums.items()}, counts


def collected(
    directory: Path, text: Path, modules: list[str] | None = None, **settings: Any
) -> dict[str, Tensor]:
    modules = modules or linear_names(directory)
    with open_calibration(
        directory, text, modules, device="cpu", most_tokens=TOKENS, **settings
    ) as found:
        return {module: found.moments(module) for module in found.order}


def linear_names(directory: Path) -> list[str]:
    architecture = read_architecture(directory, read_config(directory), trust_remote_code=False)
    return linear_modules(architecture.model)


def opened(directory: Path, text: Path, **settings: Any) -> Any:
    settings = {"device": "cpu", "most_tokens": TOKENS, **settings}
    return open_calibration(directory, text, linear_names(directory), **settings)


def close(found: Tensor, expected: Tensor) -> bool:
    # Each entry against the sizes of its two inputs: that is what float32 can hold.
    scale = expected.diagonal().sqrt()
    return bool(((found.double() - expected).abs() <= 3e-6 * torch.outer(scale, scale)).all())


@pytest.mark.parametrize("name", MODELS)
def test_moments_are_those_of_an_ordinary_forward(
    name: str, saved: Callable[[str], Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_BATCH_TOKENS", BATCH * WINDOW)
    monkeypatch.setattr("loftq_cli.models.moments._PANEL", 48)  # does not divide 64
    directory = saved(name)
    expected, counts = ordinary(directory, text)
    with opened(directory, text) as found:
        assert is_staged(found) == (name not in WHOLE)
        assert sorted(found.order) == sorted(linear_names(directory))
        assert found.tokens == found.windows * found.window_length
        assert TOKENS - 2 * found.window_length < found.tokens <= TOKENS
        for module in found.order:
            moments = found.moments(module)
            assert moments.dtype == torch.float32
            assert torch.equal(moments, moments.T)
            if module in expected:
                assert close(moments, expected[module]), module
            else:
                assert not moments.any(), module
        assert sorted(found.unseen) == sorted(set(found.order) - set(counts))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_what_was_skipped_changes_no_bit(
    name: str, saved: Callable[[str], Path], text: Path
) -> None:
    everything = collected(saved(name), text)
    last = list(everything)[-1]
    for modules in ([last], [next(iter(everything)), last]):
        for module, moments in collected(saved(name), text, modules).items():
            assert torch.equal(moments, everything[module])
    with opened(saved(name), text) as found:  # as a run that resumes, and one that goes back
        assert torch.equal(found.moments(last), everything[last])
        for module in list(everything)[::5]:
            assert torch.equal(found.moments(module), everything[module])


def test_order_is_the_order_in_which_blocks_run(saved: Callable[[str], Path], text: Path) -> None:
    modules = linear_names(saved("t5"))
    with open_calibration(
        saved("t5"), text, modules[::-1], device="cpu", most_tokens=TOKENS
    ) as found:
        owners = [module.split(".layer.")[0] for module in found.order]
    expected = [f"{side}.block.{number}" for side in ("encoder", "decoder") for number in (0, 1)]
    assert list(dict.fromkeys(owners)) == [*expected, "lm_head"]


def test_modules_with_the_same_input_share_its_moments(
    saved: Callable[[str], Path], text: Path
) -> None:
    def groups(name: str, prefix: str) -> list[set[str]]:
        with opened(saved(name), text) as found:
            moments = {each: found.moments(each) for each in found.order if prefix in each}
        same: dict[int, set[str]] = {}
        for module, each in moments.items():
            same.setdefault(id(each), set()).add(module.rpartition(".")[2])
        return list(same.values())

    assert groups("llama", ".layers.1.") == [
        {"q_proj", "k_proj", "v_proj"},
        {"o_proj"},
        {"gate_proj", "up_proj"},
        {"down_proj"},
    ]
    # Queries and keys of DeBERTa are also made from relative positions, values are not.
    assert groups("deberta_v2", ".layer.0.attention.self") == [
        {"query_proj", "key_proj"},
        {"value_proj"},
    ]


def test_moments_of_earlier_blocks_are_freed(saved: Callable[[str], Path], text: Path) -> None:
    with opened(saved("llama"), text) as found:
        first, second = (f"model.layers.{number}.mlp.down_proj" for number in (0, 1))
        earlier = weakref.ref(found.moments(first))
        assert found.moments(first) is earlier()
        found.moments(second)
        gc.collect()
        assert earlier() is None
        assert found.moments(second) is found.moments(second)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "mixtral"])
def test_weights_left_in_their_files_give_the_same(
    name: str, saved: Callable[[str], Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[dict[str, Any]] = []
    load = calibration.read_weights

    def note(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        placed.append(getattr(model, "hf_device_map", {}))
        return model

    monkeypatch.setattr(calibration, "read_weights", note)
    within = collected(saved(name), text)
    outside = collected(saved(name), text, max_memory_bytes=200_000)
    assert "disk" not in placed[0].values()
    assert "disk" in placed[1].values()
    assert list(within) == list(outside)
    for module in within:
        assert torch.equal(within[module], outside[module]), module


@pytest.mark.parametrize(("stored", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_weights(
    stored: str, tolerance: float, saved: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    directory = tmp_path / stored
    model = transformers.LlamaForCausalLM.from_pretrained(saved("llama"))
    model.to(getattr(torch, stored)).save_pretrained(directory)
    add_tokenizer(directory)
    expected = collected(saved("llama"), text)
    for module, moments in collected(directory, text).items():
        assert moments.dtype == torch.float32
        error = float((moments - expected[module]).norm() / expected[module].norm())
        assert error < tolerance, (module, error)


@pytest.mark.parametrize(
    ("value", "first_broken"), [(float("nan"), "mlp.c_fc"), (3e38, "mlp.c_proj")]
)
def test_broken_activations_are_named(
    value: float, first_broken: str, saved: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """Only those modules that are given them fail."""
    directory = shutil.copytree(saved("gpt2"), tmp_path / "gpt2")
    weights = load_file(directory / "model.safetensors")
    if first_broken == "mlp.c_fc":
        weights["transformer.h.1.ln_2.bias"][5] = value
    else:
        weights["transformer.h.1.mlp.c_fc.bias"][5] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with opened(directory, text) as found:
        broken = found.order.index(f"transformer.h.1.{first_broken}")
        for module in found.order[:broken]:
            assert found.moments(module).isfinite().all()
        with pytest.raises(LoftqError) as caught:
            found.moments(found.order[broken])
    assert caught.value.what == (
        f"the inputs of transformer.h.1.{first_broken} are NaN, infinite or too large to be "
        f"squared on the calibration text: {found.tokens} of {found.tokens} tokens"
    )
    assert caught.value.cause
    assert caught.value.hint


def test_a_text_that_fills_no_window(saved: Callable[[str], Path], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.", "utf-8")
    with pytest.raises(InvalidSetting, match="too short"), opened(saved("gpt2"), short):
        pass


def test_no_tokenizer(saved: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(
        saved("gpt2"), tmp_path / "gpt2", ignore=shutil.ignore_patterns("tokenizer*")
    )
    with pytest.raises(UnsupportedModel, match="no tokenizer"), opened(directory, text):
        pass


def test_a_tokenizer_of_another_model(text: Path, tmp_path: Path) -> None:
    BATTERY["gpt2"].build().save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    with pytest.raises(CorruptCheckpoint, match="not this model's"), opened(tmp_path, text):
        pass


def test_a_model_that_reads_no_text(text: Path, tmp_path: Path) -> None:
    BATTERY["vit"].build().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="does not read text"), opened(tmp_path, text):
        pass


class Chain(nn.Module):
    """A model of three blocks that may talk past their outputs."""

    class Block(nn.Module):
        def __init__(self, shared: list[Tensor] | None) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.shared = shared

        def forward(self, hidden: Tensor) -> Tensor:
            hidden = hidden + self.linear(hidden)
            if self.shared is not None:
                hidden = hidden + sum(self.shared)
                self.shared.append(hidden)
            return hidden

    def __init__(self, talking: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared: list[Tensor] | None = [] if talking else None
        self.config = transformers.PretrainedConfig()
        self.embedding = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([self.Block(self.shared) for _ in range(3)])
        self.last = nn.Linear(8, 8)

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.shared is not None:
            self.shared.clear()
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.last(hidden)


@pytest.mark.parametrize("talking", [False, True])
def test_blocks_that_talk_past_their_outputs_run_in_one_piece(talking: bool) -> None:
    model = Chain(talking)
    windows = torch.arange(64).reshape(4, 16) % 13
    inputs: list[Tensor] = []
    with torch.no_grad(), layerwise.watched(model, ["last"], lambda _, x: inputs.append(x)):
        model(windows)
    rows = inputs[0].reshape(-1, 8).double()
    found = Calibration(model, windows, ["last", "layers.2.linear"], "cpu")
    assert is_staged(found) is not talking
    assert close(found.moments("last"), rows.T @ rows / len(rows))
    if not talking:
        assert found.order == ["layers.2.linear", "last"]


def test_inputs_that_are_shared_at_times_only() -> None:
    """Their moments would be taken for one and the same, and would not be."""

    class Forking(Chain):
        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.embedding(input_ids)
            other = hidden if (input_ids < 9).all() else hidden + 1
            return self.layers[0].linear(hidden) + self.last(other)

    windows = torch.arange(64).reshape(4, 16) % 9
    modules = ["layers.0.linear", "last"]
    found = Calibration(Forking(talking=False), windows, modules, "cpu")
    assert found.moments("last") is found.moments("layers.0.linear")
    windows = torch.cat([windows] * 100)
    windows[-1] = 9
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.linear are given the same inputs"):
        Calibration(Forking(talking=False), windows, modules, "cpu").moments("last")


def test_a_model_that_does_not_run_on_text() -> None:
    model = Chain(talking=False)
    windows = torch.full((1, 16), 99)  # more than the embedding has
    with pytest.raises(UnsupportedModel, match="cannot be run on text"):
        Calibration(model, windows, ["last"], "cpu")
