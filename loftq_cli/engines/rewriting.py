"""Writes a directory anew, file by file, from one that `quantize` wrote.

Every file becomes one of the same name: of a weight file all tensors, with another form in place of
each quantized weight; the rest is copied. One weight is held at a time, and what it becomes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from loftq_cli.checkpoint.index import INDEX_FILE
from loftq_cli.checkpoint.safetensors import Header, TensorInfo
from loftq_cli.checkpoint.staging import Staging
from loftq_cli.checkpoint.tensors import load_pieces
from loftq_cli.checkpoint.writer import (
    PlannedTensor,
    copy_file,
    hash_file,
    require_free_space,
    write_safetensors,
)
from loftq_cli.containers.base import Weight
from loftq_cli.engines import output
from loftq_cli.engines.written import WeightFile, Written, require_same
from loftq_cli.models.companions import companions
from loftq_cli.record import Progress, Record

Form: TypeAlias = Callable[[Weight], list[PlannedTensor]]
Converter: TypeAlias = Callable[[WeightFile, Weight], Iterator[tuple[str, memoryview]]]


def write_files(
    written: Written,
    staging: Staging,
    record: Record,
    *,
    doing: str,
    form: Form,
    convert: Converter,
    copied: Sequence[str],
    replaced: Mapping[str, tuple[Header, TensorInfo]] | None = None,
) -> None:
    """Writes weight files, index and copies, but for what an interrupted run has finished.

    Args:
        doing: what the progress is called.
        form: what becomes of a weight.
        convert: its bytes, by the names that ``form`` gave.
        copied: names of the files that stay as they are.
        replaced: tensors that are read from elsewhere, in the same shape and dtype.

    Raises:
        CorruptCheckpoint: a file is not the one of the report.
    """
    output.tell_what_is_finished(staging, record)
    kept = sum(entry.bytes for entry in staging.finished.values())
    needed = written.bytes(form) + sum(written.listed[name].bytes for name in copied)
    require_free_space(staging.target, needed - kept)
    with (
        record.timing("files"),
        record.progress(doing, len(written.weights)) as progress,
        output.telling_what_is_kept(staging, list(written.files), record),
    ):
        for name, file in written.files.items():
            if name in staging.finished:
                for weight in file.weights:
                    progress.advance(weight.module)
                continue
            # The header was read before: what changes the file from now on is seen when a tensor
            # is read.
            require_same(file.header.path, hash_file(file.header.path), written.listed[name])
            chunks = _chunks(file, convert, replaced or {}, progress)
            staging.record(name, write_safetensors(staging.path(name), file.planned(form), chunks))
        _copy_files(written, copied, staging)
    if INDEX_FILE in written.listed:
        held = {name: file.planned(form) for name, file in written.files.items()}
        output.write_index(staging, held)


def _chunks(
    file: WeightFile,
    convert: Converter,
    replaced: Mapping[str, tuple[Header, TensorInfo]],
    progress: Progress,
) -> Iterator[tuple[str, memoryview]]:
    for entry in file.entries:
        if isinstance(entry, Weight):
            progress.start(entry.module)
            yield from convert(file, entry)
            progress.advance(entry.module)
        else:
            for piece in load_pieces(*replaced.get(entry.name, (file.header, entry))):
                yield entry.name, piece


def _copy_files(written: Written, names: Sequence[str], staging: Staging) -> None:
    for name in names:
        if name not in staging.finished:
            copy = copy_file(written.source / name, staging.path(name))
            require_same(written.source / name, copy, written.listed[name])
            staging.record(name, copy)
    for folder in companions(written.source, with_code=True).empty:
        staging.make_folder(folder)
