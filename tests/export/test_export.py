"""What export writes is what `quantize` writes at once, and Q stays the same to the bit."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.containers import container_of
from loftq_cli.containers.base import StoredWeight, Weight
from loftq_cli.containers.gptq import Gptq
from loftq_cli.engines.report_file import read_report
from loftq_cli.report.formats import all_layers
from tests.export.conftest import CONTAINERS, Directories, Loftq, contents, other, report_of


def results_of(directory: Path) -> dict[str, Any]:
    """The report's results, but for what measures a run and not what it wrote."""
    results: dict[str, Any] = report_of(directory)["results"]
    for layer in results["layers"]:
        del layer["seconds"]
    del results["totals"]["seconds"], results["totals"]["peak_memory_bytes"]
    return results


@pytest.mark.parametrize("container", CONTAINERS)
def test_as_if_written_at_once_and_back(
    loftq: Loftq, directories: Directories, container: str, tmp_path: Path
) -> None:
    source, direct = directories.written[container], directories.written[other(container)]
    there, back = tmp_path / "there" / "OUT", tmp_path / "back" / "OUT"
    done = loftq("export", source, "--container", other(container), "-o", there, "--json")
    assert done.code == 0, done.err
    assert len([name for name in contents(there) if name.startswith("model-")]) > 2, "several files"
    assert contents(there) == contents(direct)
    assert (there / "2_Normalize").is_dir()
    said, expected = results_of(there), results_of(direct)
    assert (said.pop("fingerprint"), said.pop("output")) == (None, str(there))
    assert expected.pop("fingerprint") is not None
    del expected["output"]
    assert said == expected

    found = json.loads(done.out)["results"]
    assert (found["source_container"], found["container"]) == (container, other(container))
    assert found["output_bytes"] == expected["totals"]["output_bytes"]
    assert found["stored_bits"] == expected["totals"]["stored_bits"]
    former = report_of(source)["results"]
    assert found["input_bytes"] == former["totals"]["output_bytes"]
    assert found["source_stored_bits"] == former["totals"]["stored_bits"]
    assert found["files"] == report_of(there)["results"]["files"]

    done = loftq("export", there, "--container", container, "-o", back)
    assert done.code == 0, done.err
    # The report has another place and no fingerprint. The README of a directory that is called
    # otherwise would be another too: it names it.
    assert contents(back) == contents(source)
    report, former_report = report_of(back), report_of(source)
    for each in (report, former_report):
        del each["results"]["output"], each["results"]["fingerprint"]
    assert report == former_report


def stored(directory: Path) -> dict[str, StoredWeight]:
    """Every quantized weight, by its module; of a Llama tensors are called as the modules."""
    report = read_report(directory)
    container = container_of(report.results.settings.container, 4, report.results.settings)
    tensors = open_checkpoint(directory).tensors
    weights = [
        Weight(f"{each.name}.weight", each.name, each.shape, each.bits or 0, "BF16")
        for each in all_layers(report.results)
    ]
    return {each.module: container.read(tensors, each, "cpu") for each in weights}


@pytest.mark.parametrize("container", CONTAINERS)
def test_codes_scales_and_Q_are_the_same_to_the_bit(
    loftq: Loftq, directories: Directories, container: str, tmp_path: Path
) -> None:
    source, out = directories.written[container], tmp_path / "out"
    done = loftq("export", source, "--container", other(container), "-o", out)
    assert done.code == 0, done.err
    settings = read_report(source).results.settings
    before, after = (container_of(name, 4, settings) for name in (container, other(container)))
    weights, exported = stored(source), stored(out)
    assert len(weights) == 14
    for module, weight in weights.items():
        one, another = before.quantized(weight), after.quantized(exported[module])
        assert torch.equal(one.codes, another.codes)
        assert torch.equal(one.scales, another.scales)
        Q = after.runtime(exported[module])
        assert Q.dtype == torch.bfloat16
        assert torch.equal(before.runtime(weight), Q)


def test_one_weight_is_held_at_a_time(
    loftq: Loftq, original: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read, unpacked = Gptq.read, Gptq.quantized
    held: list[weakref.ref[torch.Tensor]] = []
    seen: list[int] = []

    def watched_read(self: Gptq, *rest: Any) -> StoredWeight:
        assert not [tensor for tensor in held if tensor() is not None]
        weight = read(self, *rest)
        held[:] = map(weakref.ref, weight.parts.values())
        seen.append(sum(tensor() is not None for tensor in held))
        return weight

    def watched_quantized(self: Gptq, weight: StoredWeight) -> Any:
        found = unpacked(self, weight)
        held.extend((weakref.ref(found.codes), weakref.ref(found.scales)))
        return found

    monkeypatch.setattr(Gptq, "read", watched_read)
    monkeypatch.setattr(Gptq, "quantized", watched_quantized)
    done = loftq("export", original, "--container", "compressed-tensors", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert seen == [4] * 14, "they are seen while they are there"


def test_a_readme_that_someone_wrote_into(loftq: Loftq, written: Path, tmp_path: Path) -> None:
    """It is made anew, and nothing in it is read."""
    (written / "README.md").write_text("my model")
    out = tmp_path / "out"
    done = loftq("export", written, "--container", "compressed-tensors", "-o", out)
    assert done.code == 0, done.err
    assert (out / "README.md").read_text().startswith("# out\n")


@pytest.mark.parametrize("container", CONTAINERS)
def test_verify_proves_it_with_and_without_the_source(
    loftq: Loftq, directories: Directories, container: str, tmp_path: Path
) -> None:
    out = tmp_path / "renamed"
    source = directories.written[container]
    done = loftq("export", source, "--container", other(container), "-o", out)
    assert done.code == 0, done.err
    adapter = json.loads((out / "loftq_init" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "renamed"
    for hidden in (False, True):
        if hidden:
            text = (out / "loftq_report.json").read_text()
            (out / "loftq_report.json").write_text(text.replace(str(directories.source), "gone"))
        proved = loftq("verify", out, "--json")
        assert proved.code == 0, proved.err
        tests = json.loads(proved.out)["results"]["tests"]
        statuses = {test["name"]: test["status"] for test in tests}
        # Whether the libraries are here that load it, the environment says.
        assert statuses.pop("forward") in ("passed", "skipped")
        against_source = {statuses.pop("residuals"), statuses.pop("copies")}
        assert against_source == {"skipped" if hidden else "passed"}
        assert set(statuses.values()) == {"passed"}
