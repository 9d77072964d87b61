"""What an `export` run will write: pure data, made from report, headers and config.

The report and the files may come from a stranger. Whatever in them does not fit together is refused
here, before anything is written; the weights themselves are looked at when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loftq_cli import schema
from loftq_cli.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_DIRECTORY
from loftq_cli.checkpoint.index import INDEX_FILE, Checkpoint, open_checkpoint
from loftq_cli.checkpoint.safetensors import Header, TensorInfo, shown
from loftq_cli.checkpoint.writer import PlannedTensor, WrittenFile, hash_file
from loftq_cli.containers import container_of, kind_of
from loftq_cli.containers.base import Container, Weight
from loftq_cli.containers.integers import Integers
from loftq_cli.engines.report_file import NOT_OURS, Report, is_plain, read_report
from loftq_cli.errors import CorruptCheckpoint, InvalidSetting, UnsupportedModel, UsageError
from loftq_cli.formats import DTYPE_NAMES
from loftq_cli.models.architecture import read_architecture
from loftq_cli.models.layers import last_part
from loftq_cli.models.source import CONFIG_FILE, README_FILE, REPORT_FILE, main_dtype, read_config
from loftq_cli.report.formats import all_layers

ADAPTER_CONFIG_NAME = f"{ADAPTER_DIRECTORY}/{ADAPTER_CONFIG}"
_MADE_ANEW = {REPORT_FILE, README_FILE, CONFIG_FILE, INDEX_FILE, ADAPTER_CONFIG_NAME}
_COPY_AGAIN = "copy it again from where it was written; `loftq verify` looks at every file"


@dataclass(frozen=True)
class FilePlan:
    """A weight file; ``parts`` has the weights, by the names of the tensors that they are here."""

    header: Header
    parts: Mapping[str, Weight]

    @property
    def entries(self) -> Iterator[Weight | TensorInfo]:
        """Each weight once, and the tensors that are copied, in the order of the file."""
        seen: set[str] = set()
        for info in self.header.tensors.values():
            weight = self.parts.get(info.name)
            if weight is None:
                yield info
            elif weight.name not in seen:
                seen.add(weight.name)
                yield weight

    @property
    def weights(self) -> list[Weight]:
        return [entry for entry in self.entries if isinstance(entry, Weight)]

    def tensors(self, container: Container) -> list[PlannedTensor]:
        """What the file holds in this container."""
        found: list[PlannedTensor] = []
        for entry in self.entries:
            if isinstance(entry, Weight):
                found += container.planned(entry)
            else:
                found.append(PlannedTensor(entry.name, entry.dtype, entry.shape))
        return found


@dataclass(frozen=True)
class ExportPlan:
    """The directory ``source``, with what its own report says of it, and what becomes of its files.

    ``skipped`` are the modules that are not quantized.
    """

    source: Path
    report: Report
    config: dict[str, Any]
    skipped: Sequence[str]
    before: Container
    after: Container
    files: Mapping[str, FilePlan]

    @property
    def weights(self) -> list[Weight]:
        return [weight for file in self.files.values() for weight in file.weights]

    @property
    def listed(self) -> dict[str, schema.WrittenFile]:
        return {each.name: each for each in self.report.results.files}

    @property
    def copied(self) -> list[str]:
        """The files that stay as they are."""
        return [name for name in self.listed if name not in {*_MADE_ANEW, *self.files}]

    def model_bytes(self, container: Container) -> int:
        planned = (each for file in self.files.values() for each in file.tensors(container))
        return sum(each.nbytes for each in planned)

    def stored_bits(self, container: Container) -> float:
        """What a quantized weight takes, scales included."""
        planned = (each for weight in self.weights for each in container.planned(weight))
        elements = sum(weight.shape[0] * weight.shape[1] for weight in self.weights)
        return 8 * sum(each.nbytes for each in planned) / elements

    def exported_report(self, out: Path) -> Report:
        """What is to be said of the output, whose files are still those of the source here.

        It has no fingerprint: no run of `quantize` may take the output for its own.
        """
        results = self.report.results
        bits = self.stored_bits(self.after)  # and no code tells less than it takes
        totals = {
            "output_bytes": self.model_bytes(self.after),
            "stored_bits": bits,
            "information_bits": bits,
        }
        changed = {
            "output": str(out),
            "fingerprint": None,
            "settings": results.settings.model_copy(update={"container": self.after.name}),
            "totals": results.totals.model_copy(update=totals),
        }
        return self.report.model_copy(update={"results": results.model_copy(update=changed)})


def plan_export(source: Path, container: str, *, trust_remote_code: bool = False) -> ExportPlan:
    """Decides for every tensor and file what becomes of it; no weight is read.

    Raises:
        ModelNotFound: the directory is nothing that loftq wrote.
        UnsupportedModel: it has no integer codes.
        UsageError: it is in this container already, or the container has no integers.
        InvalidSetting: a weight does not fit into the container.
        CorruptCheckpoint: report and files contradict each other.
    """
    report = read_report(source)
    before, after = _containers(source, report, container)
    listed = {each.name: each for each in report.results.files}
    for file in listed.values():
        _require_present(source, file)
    index = {INDEX_FILE} & listed.keys()
    for name in (CONFIG_FILE, ADAPTER_CONFIG_NAME, *index):
        _require_listed(source, name, listed)
        require_same(source / name, hash_file(source / name), listed[name])
    config, checkpoint = read_config(source), open_checkpoint(source)
    for name in checkpoint.headers:
        _require_listed(source, name, listed)
    architecture = read_architecture(source, config, trust_remote_code=trust_remote_code)
    tensors = architecture.weights_of_modules(before.weights_in(checkpoint.tensors))
    weights = _weights(report, checkpoint, tensors, before, main_dtype(config))
    before.require_fit(weights)
    after.require_fit(weights)
    _require_dtype(weights, after, main_dtype(config))
    parts = {each.name: weight for weight in weights for each in before.planned(weight)}
    files = {
        name: FilePlan(header, {part: parts[part] for part in header.tensors if part in parts})
        for name, header in checkpoint.headers.items()
    }
    skipped = _skipped(source, config, before)
    return ExportPlan(source, report, config, skipped, before, after, files)


def require_same(path: Path, found: WrittenFile, listed: schema.WrittenFile) -> None:
    """Refuses a file that is not the one of the report.

    Raises:
        CorruptCheckpoint
    """
    if (found.bytes, found.sha256) != (listed.bytes, listed.sha256):
        raise _changed(path, f"it has not the SHA-256 that {REPORT_FILE} gives")


def not_as_reported(module: str, cause: str) -> CorruptCheckpoint:
    """A layer whose tensors are not what they should be."""
    return CorruptCheckpoint(
        f"{module} is not stored as {REPORT_FILE} says", cause=cause, hint=_COPY_AGAIN
    )


def _containers(source: Path, report: Report, name: str) -> tuple[Container, Container]:
    """That of the directory, and the one to write."""
    settings = report.results.settings
    before = None
    with suppress(KeyError, UsageError):
        before = container_of(settings.container, settings.bits, settings)
    if before is None:
        raise CorruptCheckpoint(
            f"{source / REPORT_FILE} cannot be used",
            cause=f"loftq writes no {settings.bits} bits in {settings.container!r:.40}",
            hint=NOT_OURS,
        )
    if not isinstance(before, Integers):
        levels = f"{settings.quant_type} levels in {before.name}, which would be rounded"
        model = "MODEL" if report.model is None else report.model.id
        raise UnsupportedModel(
            f"{source} has no integer codes that another container could hold",
            cause=f"it has {levels if before.quantizes else 'weights in 16 bits, for plain LoRA'}",
            hint=f"loftq quantize -m {model} --container {name} -o OUT",
        )
    if name == before.name:
        raise UsageError(f"{source} is in {name} already", hint="choose another --container")
    after = kind_of(name, settings.bits)
    if not issubclass(after, Integers):
        raise UsageError(
            f"{name} has no integer codes",
            cause=f"those of {source} would be rounded to other levels",
            hint=f"loftq quantize --container {name}, from the original",
        )
    return before, after.of(settings)


def _weights(
    report: Report,
    checkpoint: Checkpoint,
    tensors: Mapping[str, str],
    container: Container,
    main: str,
) -> list[Weight]:
    """The quantized weights; ``tensors`` has their names in the files, by module."""
    layers = {layer.name: layer for layer in all_layers(report.results)}
    for module in sorted(layers.keys() ^ tensors.keys()):
        said = "no weight file has codes of it" if module in layers else "it does not name it"
        raise not_as_reported(module, said)
    if not layers:
        raise CorruptCheckpoint(f"{REPORT_FILE} names no quantized layer", hint=NOT_OURS)
    return [
        _weight(
            Weight(
                tensors[module],
                module,
                layer.shape,
                layer.bits or 0,
                main,
                transposed=last_part(module) in report.results.conv1d,
            ),
            checkpoint,
            container,
        )
        for module, layer in layers.items()
    ]


def _weight(weight: Weight, checkpoint: Checkpoint, container: Container) -> Weight:
    """The same in the dtype that its tensors tell; where they tell none, in the model's."""
    if weight.bits not in container.widths or min(weight.shape) < 1:
        raise not_as_reported(
            weight.module, f"{weight.bits} bits of shape {list(weight.shape)} cannot be"
        )
    for dtype in (weight.dtype, *DTYPE_NAMES):
        told = replace(weight, dtype=dtype)
        planned = container.planned(told)
        held = [
            checkpoint.tensors[each.name] for each in planned if each.name in checkpoint.tensors
        ]
        found = [PlannedTensor(info.name, info.dtype, info.shape) for _, info in held]
        if found == planned and len({header.path for header, _ in held}) == 1:
            return told
    raise not_as_reported(
        weight.module,
        f"no weight file has all tensors of {weight.bits} bits of shape {list(weight.shape)}",
    )


def _require_dtype(weights: Sequence[Weight], container: Container, main: str) -> None:
    """Refuses a weight in another dtype than the model's where no tensor could say so."""
    for weight in weights:
        as_main = container.planned(replace(weight, dtype=main))
        if weight.dtype != main and container.planned(weight) == as_main:
            raise InvalidSetting(
                f"{weight.module} does not fit into {container.name}",
                cause=f"it is computed in {DTYPE_NAMES[weight.dtype]}, and there all layers are in "
                f"the dtype of the model, {DTYPE_NAMES[main]}",
                hint="make the directory again: loftq quantize --dtype "
                f"{DTYPE_NAMES[main]} --container {container.name}",
            )


def _skipped(source: Path, config: Mapping[str, Any], container: Container) -> list[str]:
    quantization = config.get("quantization_config")
    skipped = quantization.get(container.skip_list) if isinstance(quantization, dict) else None
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise CorruptCheckpoint(
            f"{source / CONFIG_FILE} does not describe what is stored",
            cause=f"its quantization_config has no list called {container.skip_list}",
            hint=_COPY_AGAIN,
        )
    return skipped


def _require_present(source: Path, listed: schema.WrittenFile) -> None:
    """The name leads nowhere else, and a file of this size has it.

    The README is not read, and people write into it.
    """
    if not is_plain(listed.name):
        raise CorruptCheckpoint(
            f"{REPORT_FILE} lists {shown(listed.name)}, which is no plain name of a file",
            cause="loftq writes no such name: the report was made or changed by someone else",
            hint="do not use this directory unless you know where it comes from",
        )
    path = source / listed.name
    if listed.name == README_FILE:
        return
    if not path.is_file():
        raise _changed(path, "it is missing")
    if (size := path.stat().st_size) != listed.bytes:
        raise _changed(path, f"it has {size:,} bytes, and {listed.bytes:,} were written")


def _require_listed(source: Path, name: str, listed: Mapping[str, object]) -> None:
    if name not in listed:
        raise _changed(source / name, f"{REPORT_FILE} does not list it")


def _changed(path: Path, cause: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{path} is not the file that was written", cause=cause, hint=_COPY_AGAIN
    )
