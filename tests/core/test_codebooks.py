import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.backends.default.ops import _get_4bit_quantize_bounds
from torch import Tensor

from loftq_cli.core.absmax import search_absmax
from loftq_cli.core.blockwise import BlockwiseFormat
from loftq_cli.core.codebooks import Codebook, codebook, dynamic_map
from loftq_cli.errors import InvalidSetting


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_levels_are_those_of_bitsandbytes(quant_type: str) -> None:
    levels = codebook(quant_type).level_tensor()
    assert levels.dtype == torch.float32
    assert torch.equal(levels, bnb.get_4bit_type(quant_type, device="cpu"))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_borders_and_order_are_those_of_bitsandbytes(quant_type: str) -> None:
    midpoints, order = _get_4bit_quantize_bounds(quant_type, torch.device("cpu"))
    book = codebook(quant_type)
    assert torch.equal(book.midpoints(), midpoints)
    assert book.order_tensor().tolist() == order.tolist()


def test_levels_ascend_in_their_order() -> None:
    for quant_type in ("nf4", "fp4"):
        book = codebook(quant_type)
        ascending = book.level_tensor()[list(book.order)]
        assert (ascending.diff() >= 0).all()
        assert sorted(book.order) == list(range(16))


def test_a_smaller_codebook_lives_in_the_same_container() -> None:
    """NF2 (arXiv 2310.08659): -1, 0, 0.3379, 1 are codes 0, 7, 11 and 15 of NF4."""
    nf2 = codebook("nf4", 2)
    assert nf2 == Codebook(codebook("nf4").levels, (0, 7, 11, 15))
    assert nf2.midpoints().tolist() == pytest.approx([-0.5, 0.16895762, 0.66895762])
    assert len(codebook("nf4", 3).order) == 8


def nf3_error(order: list[int], blocks: Tensor) -> float:
    """What is left with these codes and the best absmax of either sign."""
    book = Codebook(codebook("nf4").levels, tuple(order))
    scales = search_absmax(blocks, None, book, 3e38)[:, None]
    choices = book.level_tensor()[order]
    nearest = choices[torch.bucketize(blocks / scales, book.midpoints())]
    return float((blocks - scales * nearest).double().square().sum())


def test_no_exchange_makes_a_better_nf3() -> None:
    """Any of the five that are not -1, 0 or 1 for any of the other eight."""
    blocks = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    chosen = list(codebook("nf4", 3).order)
    least = nf3_error(chosen, blocks)
    for old in set(chosen) - {0, 7, 15}:
        for new in set(range(16)) - set(chosen):
            other = sorted({*chosen, new} - {old})
            assert nf3_error(other, blocks) > least, (old, new)


def test_dynamic_map_is_that_of_bitsandbytes() -> None:
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


def test_dynamic_map_is_everybodys_own() -> None:
    dynamic_map()[0] = 7.0
    assert dynamic_map()[0] == pytest.approx(-0.99296874)


def test_unknown_type() -> None:
    with pytest.raises(InvalidSetting, match="'int4' is not one of nf4, fp4"):
        codebook("int4")


def test_no_such_number_of_bits() -> None:
    with pytest.raises(InvalidSetting, match="fp4 with 2 bits is not possible: only 4"):
        codebook("fp4", 2)
    with pytest.raises(InvalidSetting, match="nf4 with 5 bits is not possible: only 2, 3, 4"):
        BlockwiseFormat("nf4", bits=5)
