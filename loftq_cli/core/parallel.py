"""Independent pieces of work on a few threads, each with BLAS on one thread.

Threads inside BLAS meet at a barrier at the end of every product, where they spin: on a busy
machine the slowest holds up the rest, and small products lose more than they gain. Here every
thread takes the next piece when it is done with the last, and multiplies by itself. The pieces are
the same whatever the number of threads, and so is every bit of the result.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import current_process

import torch

_here = threading.local()
_most: int | None = None
_pools: dict[tuple[int | None, int], ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def use_at_most(threads: int) -> None:
    """For the rest of this process :func:`each` takes no more, beside other processes' threads.

    torch keeps its own number, which the last bits of an exact SVD and of some sums follow.
    """
    global _most
    _most = threads


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Within, this thread's BLAS keeps to one thread, and :func:`each` uses as many as it had.

    That is torch's number: OMP_NUM_THREADS, or what ``torch.set_num_threads`` said.
    """
    if getattr(_here, "threads", 0):
        yield
        return
    _here.threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_here.threads)
        _here.threads = 0


@contextmanager
def all_threads() -> Iterator[None]:
    """Within, torch has its threads back: for a sum that has to come out as torch's own."""
    torch.set_num_threads(getattr(_here, "threads", 0) or torch.get_num_threads())
    try:
        yield
    finally:
        if getattr(_here, "threads", 0):
            torch.set_num_threads(1)


def each(work: Callable[[int], None], count: int) -> None:
    """``work(0)`` to ``work(count - 1)``, in no particular order; the first error ends it."""
    pieces = iter(range(count))
    lock = threading.Lock()

    def worker() -> None:
        nonlocal pieces
        try:
            with torch.no_grad():
                while True:
                    with lock:
                        piece = next(pieces, None)
                    if piece is None:
                        return
                    work(piece)
        except BaseException:
            with lock:
                pieces = iter(())
            raise

    with one_thread_each():
        helpers = min(_most or _here.threads, _here.threads, count) - 1
        futures = [_pool(helpers).submit(worker) for _ in range(helpers)]
        try:
            worker()
        finally:
            # Also after an error no thread may go on writing into buffers that are freed.
            errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error


def _pool(helpers: int) -> ThreadPoolExecutor:
    # A forked child inherits the dictionary, but not the threads.
    key = (current_process().pid, helpers)
    with _pools_lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(
                helpers,
                thread_name_prefix="loftq",
                initializer=torch.set_num_threads,
                initargs=(1,),
            )
        return _pools[key]
