"""Reading ahead and writing behind, so that only the slowest of read, compute, write is felt.

Computing stays in the calling thread, where Ctrl-C arrives. Reading and writing are system calls,
which let other threads run.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from loftq_cli.checkpoint.safetensors import Header, TensorInfo
from loftq_cli.checkpoint.tensors import load_pieces
from loftq_cli.checkpoint.writer import PlannedTensor, WrittenFile, write_safetensors
from loftq_cli.models.hub_files import may_be_abandoned

Item = TypeVar("Item")
Read = TypeVar("Read")
Chunk = tuple[str, memoryview | bytes]

# Finished chunks that may wait for the disk; each is at most one layer's codes.
_WAITING = 4
# Seconds between two looks at whether there is room again.
_PAUSE = 0.002


class Timings:
    """Seconds spent in each stage. Stages overlap, so they may add up to more than the whole."""

    def __init__(self) -> None:
        self.seconds = {"read": 0.0, "compute": 0.0, "write": 0.0}

    def add(self, stage: str, began: float) -> None:
        self.seconds[stage] += time.perf_counter() - began


def copied(name: str, header: Header, info: TensorInfo) -> Iterator[Chunk]:
    """A tensor of a file as it is there, piece by piece."""
    for piece in load_pieces(header, info):
        yield name, bytes(piece)  # the piece's buffer is used again


def read_ahead(
    items: Sequence[Item], read: Callable[[Item], Read], timings: Timings, *, ahead: bool = True
) -> Iterator[tuple[Item, Read]]:
    """Each item with what ``read`` makes of it; the next is read while one is worked on.

    Not ``ahead``, it is read when it is asked for, and what was read before is forgotten by then.
    """

    def timed(item: Item) -> Read:
        began = time.perf_counter()
        try:
            return read(item)
        finally:
            timings.add("read", began)

    over = threading.Event()
    with ThreadPoolExecutor(
        1, thread_name_prefix="loftq-read", initializer=may_be_abandoned, initargs=(over,)
    ) as pool:
        coming: Future[Read] | None = None
        try:
            for position, item in enumerate(items):
                found = timed(item) if coming is None else coming.result()
                later = items[position + 1 : position + 2] if ahead else ()
                coming = pool.submit(timed, later[0]) if later else None
                yield item, found
                del found  # or the next item's memory would be added to this one's
        finally:
            over.set()  # what is read ahead then is not wanted any more


def write_behind(
    path: Path, plan: Sequence[PlannedTensor], chunks: Iterable[Chunk], timings: Timings
) -> WrittenFile:
    """`write_safetensors` in a thread of its own, fed with ``chunks`` as they come.

    Whatever ends the feeding, an error or Ctrl-C, also ends the file: nothing of it is left.
    """
    # Ctrl-C may come in the middle of handing over. A `queue.Queue` would then stay locked, and
    # the writer wait for ever for what comes next; this one has no lock that Python code holds.
    waiting: queue.SimpleQueue[Chunk | BaseException | None] = queue.SimpleQueue()

    def arriving() -> Iterator[Chunk]:
        while (chunk := waiting.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            began = time.perf_counter()
            yield chunk
            timings.add("write", began)

    with ThreadPoolExecutor(1, thread_name_prefix="loftq-write") as pool:
        written = pool.submit(write_safetensors, path, plan, arriving())

        def hand_over(chunk: Chunk | BaseException | None) -> None:
            """Waits for room, but not for a writer that has given up."""
            while waiting.qsize() >= _WAITING and not written.done():
                time.sleep(_PAUSE)
            waiting.put(chunk)

        try:
            for chunk in chunks:
                hand_over(chunk)
                if written.done():
                    break  # it failed: its error is raised below
            hand_over(None)
        except BaseException as error:
            waiting.put(error)
            raise
        return written.result()
