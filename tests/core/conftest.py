"""What all tests of the numerics share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, which spin against a busy machine's work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def bitsandbytes_uncompiled() -> Iterator[None]:
    """bitsandbytes compiles a dequantization of its own for every odd shape: not here."""
    with torch.compiler.set_stance("force_eager"):
        yield
