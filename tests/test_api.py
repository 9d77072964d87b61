"""`from loftq_cli import load, quantize, verify`: what the commands do, called from Python."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer

from loftq_cli import cli, load, quantize, verify
from loftq_cli.errors import CheckFailed, ModelNotFound, OutputExists, UsageError
from loftq_cli.record import Listener, Progress
from tests.conftest import Outcome

# What says how a result is shown. Python has the document, and shows it as it likes.
SHOWING = {"format", "json", "save", "html", "quiet", "debug", "help"}


class Remembering(Listener):
    """Whoever is told, and keeps it."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.stages: list[str] = []
        self.pieces: list[str] = []
        self.note = self.notes.append  # type: ignore[method-assign]
        self.warn = self.warnings.append  # type: ignore[method-assign]

    def progress(self, label: str, total: int) -> AbstractContextManager[Progress]:
        told = Progress()
        told.advance = self.pieces.append  # type: ignore[method-assign]

        @contextmanager
        def stage() -> Iterator[Progress]:
            yield told
            self.stages.append(label)

        return stage()


@pytest.mark.parametrize("function", [quantize, verify])
def test_arguments_are_the_options_of_the_command(function: Callable[..., Any]) -> None:
    command = typer.main.get_command(cli.app).get_command(None, function.__name__)
    options = {each.name: each.default for each in command.params if each.name not in SHOWING}
    arguments = inspect.signature(function).parameters
    assert set(arguments) == {*options, "listener"}
    for name, default in options.items():
        if name != "directory":
            assert arguments[name].default == default, name
            assert name == "model" or arguments[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_documents_are_those_of_the_commands(
    tmp_path: Path, loftq: Callable[..., Outcome], capfd: pytest.CaptureFixture[str]
) -> None:
    from loftq_cli.schema import load_document

    there = Remembering()
    document = quantize(
        output=tmp_path / "out", rank=4, iterations=1, bits="4x1,2", verify=True, listener=there
    )
    assert capfd.readouterr() == ("", "")
    assert there.stages == ["quantizing", "verifying"]
    assert there.notes[0].startswith(
        "verified: files, container, adapter, totals, residuals, copies, forward"
    )
    assert len(there.pieces) > 16
    command = " ".join(document.argv).replace(str(tmp_path), "")
    expected = "loftq quantize --bits 4x1,2 --rank 4 --iterations 1 --verify --output /out"
    assert command == expected
    done = loftq(*document.argv[1:], "--force", "--json")
    assert steady(load_document(done.out)) == steady(document)
    certificate = verify(str(tmp_path / "out"), sample=2)
    assert certificate.results.measured_layers == 2
    done = loftq(*certificate.argv[1:], "--json")
    assert steady(load_document(done.out)) == steady(certificate)


def steady(document: Any) -> Any:
    """Without what no two runs share."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            volatile = ("seconds", "peak_memory", "environment", "argv", "warnings")
            return {
                key: kept(each)
                for key, each in value.items()
                if not any(word in key for word in volatile)
            }
        return [kept(each) for each in value] if isinstance(value, list) else value

    return kept(document.model_dump())


@pytest.mark.parametrize("container", ["bitsandbytes", "gptq"])
def test_load_gives_what_the_command_loads(
    container: str, tmp_path: Path, loftq: Callable[..., Outcome], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    quantize(output=out, container=container, init="qlora", rank=4)
    arguments = inspect.signature(load).parameters
    command = typer.main.get_command(cli.app).get_command(None, "load")
    options = {each.name: each.default for each in command.params}
    for name in ("device", "dtype", "trust_remote_code"):
        assert arguments[name].default == options[name]
    model: Any = load(out, trainable=True)
    assert capfd.readouterr() == ("", "")
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    results = json.loads(loftq("load", "-m", out, "--json").out)["results"]
    held = Counter(str(each.dtype).removeprefix("torch.") for each in model.parameters())
    assert held.keys() == results["bytes_by_dtype"].keys()
    assert sum(each.nbytes for each in model.parameters()) == results["parameter_bytes"]
    with pytest.raises(UsageError, match="--dtype takes"):
        load(out, dtype="int8")
    with pytest.raises(ModelNotFound):
        load(tmp_path / "elsewhere")


def test_what_is_wrong_is_raised(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="nowhere to write"):
        quantize("demo")
    for wrong in ({"quant_type": "nf5"}, {"svd": "slow"}, {"init": "best"}, {"rank": 0}):
        options: dict[str, Any] = wrong
        with pytest.raises(UsageError):
            quantize(output=tmp_path / "out", **options)
    foreseen = quantize(output=str(tmp_path / "out"), dry_run=True, target_modules=["c_attn"])
    assert foreseen.results.totals.weight_error_relative is None
    assert len(foreseen.results.layers) == 4
    assert not (tmp_path / "out").exists()
    quantize(output=tmp_path / "out", init="qlora", rank=4)
    with pytest.raises(OutputExists):
        quantize(output=tmp_path / "out")
    (tmp_path / "out" / "more.bin").write_bytes(b"")
    with pytest.raises(CheckFailed, match="not in the report's list") as caught:
        verify(tmp_path / "out", sample=1)
    statuses = {each.name: each.status for each in caught.value.document.results.tests}
    assert statuses["files"] == "failed"
    assert statuses["forward"] == "passed"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", ["3", 2.5, float("nan"), True])
@pytest.mark.parametrize("name", ["rank", "distill_steps"])
def test_numbers_that_are_none(tmp_path: Path, name: str, value: Any) -> None:
    """Typer refuses them on the command line."""
    text = tmp_path / "text"
    text.write_text("some text")
    asked: dict[str, Any] = {"init": "calibrated", "calibration_text": str(text), name: value}
    with pytest.raises(UsageError, match="is no whole number"):
        quantize(output=tmp_path / "out", **asked)
    assert [*tmp_path.iterdir()] == [text]
