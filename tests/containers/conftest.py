"""What `quantize` makes of the demo's weights, each directory once in a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from loftq_cli import api
from tests.containers.demo_opt import WrittenOpt, save_demo_opt


@pytest.fixture(scope="session")
def demo_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_demo_opt(tmp_path_factory.mktemp("demo") / "opt")


@pytest.fixture(scope="session")
def quantized_opt(
    demo_opt: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., WrittenOpt]:
    @cache
    def written(
        container: str,
        bits: int | str,
        block_size: int = 64,
        dtype: str = "float32",  # a CPU is many times faster in it
    ) -> WrittenOpt:
        directory = tmp_path_factory.mktemp("quantized") / "out"
        document = api.quantize(
            model=str(demo_opt), output=directory, container=container, bits=bits,
            block_size=block_size, dtype=dtype, rank=8, iterations=1,
        )  # fmt: skip
        return WrittenOpt(directory, demo_opt, document)

    return written
