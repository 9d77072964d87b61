"""A directory that `quantize` wrote, by its own report: what another directory is made from.

The report and the files may come from a stranger. Whatever in them does not fit together is refused
here, before anything is written. Each file is held against the size and hash of the report when it
is read, so nothing is taken that was not written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli import schema
from loftq_cli.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_DIRECTORY
from loftq_cli.checkpoint.index import INDEX_FILE, Checkpoint, open_checkpoint
from loftq_cli.checkpoint.safetensors import Header, TensorInfo, shown
from loftq_cli.checkpoint.writer import PlannedTensor, WrittenFile, hash_file
from loftq_cli.containers import container_of
from loftq_cli.containers.base import Container, Damaged, StoredWeight, Weight
from loftq_cli.engines.report_file import NOT_OURS, Report, is_plain
from loftq_cli.errors import CorruptCheckpoint, UsageError
from loftq_cli.formats import DTYPE_NAMES
from loftq_cli.models.architecture import read_architecture
from loftq_cli.models.layers import last_part
from loftq_cli.models.source import CONFIG_FILE, README_FILE, REPORT_FILE, main_dtype, read_config
from loftq_cli.report.formats import all_layers

if TYPE_CHECKING:
    from loftq_cli.models.architecture import Architecture

ADAPTER_CONFIG_NAME = f"{ADAPTER_DIRECTORY}/{ADAPTER_CONFIG}"
COPY_AGAIN = "copy it again from where it was written; `loftq verify` looks at every file"


@dataclass(frozen=True)
class WeightFile:
    """A weight file; ``parts`` has the weights, by the names of the tensors that they are here."""

    header: Header
    parts: Mapping[str, Weight]

    @property
    def entries(self) -> Iterator[Weight | TensorInfo]:
        """Each weight once, and the other tensors, in the order of the file."""
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

    def planned(self, of: Callable[[Weight], Iterable[PlannedTensor]]) -> list[PlannedTensor]:
        """What the file holds when each weight is what ``of`` says, and the rest what it was."""
        found: list[PlannedTensor] = []
        for entry in self.entries:
            if isinstance(entry, Weight):
                found += of(entry)
            else:
                found.append(PlannedTensor(entry.name, entry.dtype, entry.shape))
        return found


@dataclass(frozen=True)
class Written:
    """The directory ``source``, with what its report says of it; ``files`` are those of weights."""

    source: Path
    report: Report
    config: dict[str, Any]
    container: Container
    files: Mapping[str, WeightFile]

    @property
    def weights(self) -> list[Weight]:
        return [weight for file in self.files.values() for weight in file.weights]

    @property
    def listed(self) -> dict[str, schema.WrittenFile]:
        return {each.name: each for each in self.report.results.files}

    def bytes(self, of: Callable[[Weight], Iterable[PlannedTensor]]) -> int:
        """Of all tensors of the model when each quantized weight is what ``of`` says."""
        return sum(each.nbytes for file in self.files.values() for each in file.planned(of))

    def stored(self, file: WeightFile, weight: Weight) -> StoredWeight:
        """The tensors of a weight, all of whose codes may be there.

        Raises:
            CorruptCheckpoint: they are not what they should be.
        """
        tensors = {name: (file.header, info) for name, info in file.header.tensors.items()}
        try:
            stored = self.container.read(tensors, weight, "cpu")
            self.container.require_codes(stored)
        except Damaged as error:
            raise not_as_reported(weight.module, str(error)) from None
        return stored


def reported_container(source: Path, report: Report) -> Container:
    """The container of a directory, by the settings in its report.

    Raises:
        CorruptCheckpoint: there is no such.
    """
    settings = report.results.settings
    with suppress(KeyError, UsageError):
        return container_of(settings.container, settings.bits, settings)
    raise CorruptCheckpoint(
        f"{source / REPORT_FILE} cannot be used",
        cause=f"loftq writes no {settings.bits} bits in {settings.container!r:.40}",
        hint=NOT_OURS,
    )


def open_written(
    source: Path, report: Report, container: Container, *, trust_remote_code: bool
) -> tuple[Written, Architecture]:
    """Holds every name and size of a directory against its report; no weight is read.

    Raises:
        CorruptCheckpoint: they contradict each other.
    """
    listed = {each.name: each for each in report.results.files}
    for file in listed.values():
        require_present(source, file)
    index = {INDEX_FILE} & listed.keys()
    for name in (*described_by(report), *index):
        require_listed(source, name, listed)
        require_same(source / name, hash_file(source / name), listed[name])
    config, checkpoint = read_config(source), open_checkpoint(source)
    for name in checkpoint.headers:
        require_listed(source, name, listed)
    architecture = read_architecture(source, config, trust_remote_code=trust_remote_code)
    if container.quantizes:
        tensors = architecture.weights_of_modules(container.weights_in(checkpoint.tensors))
    else:  # nothing in the files tells layers from others
        named = {layer.name for layer in all_layers(report.results)}
        of_modules = architecture.weights_of_modules(checkpoint.tensors)
        tensors = {module: name for module, name in of_modules.items() if module in named}
    weights = _weights(report, checkpoint, tensors, container, main_dtype(config))
    container.require_fit(weights)
    parts = {each.name: weight for weight in weights for each in container.planned(weight)}
    files = {
        name: WeightFile(header, {part: parts[part] for part in header.tensors if part in parts})
        for name, header in checkpoint.headers.items()
    }
    return Written(source, report, config, container, files), architecture


def described_by(report: Report) -> list[str]:
    """The configs that such a directory has: of the model, and of the adapter if there is one."""
    return [CONFIG_FILE, *([ADAPTER_CONFIG_NAME] if report.results.layers else [])]


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
        f"{module} is not stored as {REPORT_FILE} says", cause=cause, hint=COPY_AGAIN
    )


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


def require_present(source: Path, listed: schema.WrittenFile) -> None:
    """The name leads nowhere else, and a file of this size has it.

    The README is not read, and people write into it.

    Raises:
        CorruptCheckpoint
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


def require_listed(source: Path, name: str, listed: Mapping[str, object]) -> None:
    """Refuses a directory whose report says nothing of a file.

    Raises:
        CorruptCheckpoint
    """
    if name not in listed:
        raise _changed(source / name, f"{REPORT_FILE} does not list it")


def _changed(path: Path, cause: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{path} is not the file that was written", cause=cause, hint=COPY_AGAIN
    )
