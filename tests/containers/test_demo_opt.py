"""What the containers of integers are tried on: it is the demo, and `quantize` says the same of it
in each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from loftq_cli.checkpoint.adapter import ADAPTER_NAME
from tests.containers.demo_opt import WrittenOpt, as_opt, load_demo, windows


def test_it_gives_what_the_demo_gives() -> None:
    demo, tokens = load_demo(torch.float32), windows(2, 200)
    with torch.no_grad():
        expected, found = demo(tokens).logits, as_opt(demo)(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 8])
def test_codes_scales_and_adapters_are_the_same_in_each_container(
    bits: int, quantized_opt: Callable[..., WrittenOpt]
) -> None:
    one, other = (quantized_opt(name, bits) for name in ("gptq", "compressed-tensors"))
    ours, theirs = one.quantized(), other.quantized()
    assert len(ours) == 24
    assert any((each.scales < 0).any() for each in ours.values())
    for module, each in ours.items():
        assert torch.equal(each.codes, theirs[module].codes), module
        assert torch.equal(each.scales, theirs[module].scales), module
    adapters = {(each.directory / ADAPTER_NAME).read_bytes() for each in (one, other)}
    assert len(adapters) == 1
