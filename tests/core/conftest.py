"""What all tests of the numerics share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def bitsandbytes_uncompiled() -> Iterator[None]:
    """bitsandbytes compiles a dequantization of its own for every odd shape: not here."""
    with torch.compiler.set_stance("force_eager"):
        yield
