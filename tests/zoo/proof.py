"""Whether what `quantize` writes of a model loads as its README says, and is what was planned."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import loftq_cli
from loftq_cli.errors import CheckFailed, LoftqError, first_line
from loftq_cli.schema import QuantizeResults
from tests.battery import Entry
from tests.zoo import ONLY_FLOAT32, UNREACHED, ZOO
from tests.zoo.making import structured

OPTIONS: dict[str, Any] = {"rank": 4, "init": "pissa", "iterations": 1}


@dataclass
class Outcome:
    """What came of one architecture: refused with a reason, or loaded, with all that is amiss."""

    refused: str | None = None
    quantized: int = 0  # layers
    adapted: int = 0  # of them
    without: float = 0.0  # relative error of the outputs without the adapter
    together: float = 0.0  # and with it
    amiss: list[str] = field(default_factory=list)


def outcome_of(name: str, directory: Path) -> Outcome:
    """Quantizes a model of this architecture in an empty directory and tries what came out."""
    entry, outcome = ZOO[name], Outcome()
    with _quiet_in(directory):
        dtype = torch.float32 if name in ONLY_FLOAT32 else torch.bfloat16
        model = structured(entry.build(dtype=dtype))
        model.save_pretrained("source")
        try:
            results = loftq_cli.quantize("source", output="out", **OPTIONS).results
        except LoftqError as error:
            outcome.refused = error.what + (f" ({error.cause})" if error.cause else "")
            outcome.amiss += _badly_refused(error)
            return outcome
        outcome.adapted = len(results.layers)
        outcome.quantized = outcome.adapted + len(results.without_adapter)
        outcome.amiss += _badly_foreseen(results.totals.trainable_parameters)
        outcome.amiss += _unverified()
        try:
            loaded = _loaded_by_the_card()
        except Exception as error:
            outcome.amiss.append(f"the card's lines fail: {first_line(error)}")
            return outcome
        outcome.amiss += _unlike(loaded, results)
        inputs = {
            key: each.to(dtype) if each.is_floating_point() else each
            for key, each in entry.inputs().items()
        }
        outcome.amiss += _untrained(
            loaded, {**inputs, **_labels(entry, inputs)}, UNREACHED.get(name)
        )
        try:
            outcome.without, outcome.together = _errors(model, loaded, inputs)
        except Exception as error:
            outcome.amiss.append(f"no outputs: {first_line(error)}")
        if not outcome.together < min(0.25, 0.7 * outcome.without):
            outcome.amiss.append(
                f"outputs are {outcome.together:.3f} off, {outcome.without:.3f} without adapter"
            )
    return outcome


def _badly_refused(error: LoftqError) -> Iterator[str]:
    if error.exit_code != 1:
        yield f"exit code {error.exit_code}"
    if error.hint is None:
        yield "refused without a word on what would work"
    left = sorted(path.name for path in Path().iterdir() if path.name != "source")
    if left:
        yield f"left behind: {', '.join(left)}"


def _badly_foreseen(trainable: int) -> Iterator[str]:
    by_names = loftq_cli.quantize("source", dry_run=True, **OPTIONS).results
    if by_names.counted_by != "names":
        yield "--dry-run does not say that it goes by names"
    asked = loftq_cli.quantize("source", dry_run=True, preflight=True, **OPTIONS).results
    foreseen = asked.totals.trainable_parameters
    if foreseen != trainable:
        yield f"--dry-run says {foreseen} trainable parameters, the report {trainable}"


def _unverified() -> list[str]:
    try:
        tests = loftq_cli.verify("out").results.tests
    except CheckFailed as error:
        tests = error.document.results.tests
    except LoftqError as error:
        return [f"verify: {error.what}"]
    return [
        f"verify: {test.name} {test.status}: {test.detail} ({test.cause})"
        for test in tests
        if test.status != "passed"
    ]


def _loaded_by_the_card() -> Any:
    """What the code under "## Load" makes, run from the directory that holds the output."""
    section = Path("out/README.md").read_text("utf-8").partition("## Load")[2]
    found = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    return names["model"]


def _unlike(model: Any, results: QuantizeResults) -> Iterator[str]:
    """What differs between the plan, the file and what is loaded."""
    planned = {layer.name for layer in results.layers}
    with safe_open("out/loftq_init/adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        held = {
            name.removeprefix("base_model.model."): file.get_tensor(name)
            for name in names
            if ".lora_" in name
        }
    attached = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A)
    }
    for what, found in (
        ("in the file", {name.partition(".lora_")[0] for name in held}),
        ("attached", set(attached)),
    ):
        if planned - found:
            yield f"{len(planned - found)} not {what}, as {min(planned - found)}"
        if found - planned:
            yield f"{len(found - planned)} {what} beyond the plan, as {min(found - planned)}"
    for name, tensor in held.items():
        module, _, which = name.partition(".lora_")
        if module in attached:
            layer = getattr(attached[module], f"lora_{which[0]}")["default"]
            if not torch.equal(layer.weight.cpu(), tensor):
                yield f"{name} is not what the file holds"
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    count = sum(p.numel() for p in adapters)
    if count != results.totals.trainable_parameters:
        yield (
            f"PEFT trains {count} parameters, the report says {results.totals.trainable_parameters}"
        )
    if not all(p.requires_grad for p in adapters):
        yield "an adapter is frozen"


def _untrained(model: Any, inputs: dict[str, torch.Tensor], unreached: str | None) -> Iterator[str]:
    """Adapters that one step of training gives no gradient, or why there is no step."""
    try:
        outputs = model.train()(**inputs)
        loss = outputs.get("loss")
        if loss is None:
            loss = sum(each.square().mean() for each in _floats(outputs.to_tuple()))
        loss.backward()
    except Exception as error:
        yield f"no step of training: {first_line(error)}"
        return
    without = sorted(
        name.removeprefix("base_model.model.")
        for name, p in model.named_parameters()
        if "lora_" in name and (p.grad is None or not p.grad.any() or not p.grad.isfinite().all())
        if unreached is None or unreached not in name
    )
    model.zero_grad()
    if without:
        yield f"{len(without)} without a gradient, as {without[0]}"


def _labels(entry: Entry, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What this class calls the right answers; nothing where any number in its outputs will do."""
    name = entry.model_class
    if name.endswith("ForQuestionAnswering"):
        return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])}
    if name.endswith("Classification") and not name.endswith("ForTokenClassification"):
        return {"labels": torch.tensor([0, 1])}
    if name.endswith("ForCTC"):
        return {"labels": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if tokens is not None and name.endswith(("ForTokenClassification", "ForPreTraining")):
        return {"labels": tokens % 2}
    generates = ("LM", "LMHeadModel", "MTModel", "DecoderModel", "ForConditionalGeneration")
    if tokens is not None and name.endswith(generates) and name != "MusicgenForCausalLM":
        return {"labels": tokens.contiguous()}
    return {}


def _floats(outputs: Any) -> Iterator[torch.Tensor]:
    for output in outputs:
        if isinstance(output, tuple):
            yield from _floats(output)
        elif isinstance(output, torch.Tensor) and output.is_floating_point():
            yield output.float()


def _first(outputs: Any) -> torch.Tensor:
    """The logits, or what stands for them in a model without."""
    logits = outputs.get("logits", outputs.get("start_logits"))
    return next(_floats(outputs.to_tuple())) if logits is None else logits.float()


def _errors(original: Any, loaded: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """How far the outputs are from the original's, without the adapter and with it."""
    with torch.no_grad():
        wanted = _first(original(**inputs))
        together = _first(loaded.eval()(**inputs))
        with loaded.disable_adapter():
            without = _first(loaded(**inputs))
    size = wanted.norm()
    return float((wanted - without).norm() / size), float((wanted - together).norm() / size)


@contextmanager
def _quiet_in(directory: Path) -> Iterator[None]:
    """In this directory, where the card's relative paths lead; without the libraries' advice."""
    from loftq_cli.libraries import quietly

    before = Path.cwd()
    os.chdir(directory)
    try:
        with warnings.catch_warnings(), quietly():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.chdir(before)
