"""Integer codes as streams of bits: what GPTQ's and compressed-tensors' files have in common.

A row's codes follow each other without a gap: code i, as the unsigned number q + 2^(b−1), begins
at bit i·b of the row, least significant bits first, and the row is cut into little-endian words of
32 bits. At 3 bits a code may begin in one word and end in the next. 32 codes are b words, so rows
of whole groups of 32 fill their words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# So many codes fill so many words as they have bits.
GROUP = 32
# Eight codes of at most eight bits fit into an int64, and fill whole bytes.
_TOGETHER = 8
# Work goes by about this many codes, so that no temporary grows with the weight.
_CHUNK = 1 << 20


def words(count: int, bits: int) -> int:
    """Of 32 bits, for so many codes of a row."""
    return count // GROUP * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes q (rows, n), int8, as words: int32 (rows, n · bits / 32). n is a multiple of 32."""
    import torch

    rows, n = codes.shape
    numbers = (codes.to(torch.int16) + (1 << (bits - 1))).view(rows, n // _TOGETHER, _TOGETHER)
    together = torch.zeros(numbers.shape[:2], dtype=torch.int64, device=codes.device)
    for place in range(_TOGETHER):
        together |= numbers[:, :, place].long() << (bits * place)
    filled = together.view(torch.uint8).view(rows, n // _TOGETHER, 8)[:, :, :bits]
    return filled.reshape(rows, -1).view(torch.int32)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes q (rows, n), int8, out of words (rows, n · bits / 32)."""
    import torch

    rows, n = packed.shape[0], packed.shape[1] // bits * GROUP
    filled = packed.contiguous().view(torch.uint8).view(rows, n // _TOGETHER, bits)
    bytes_ = torch.zeros(rows, n // _TOGETHER, 8, dtype=torch.uint8, device=packed.device)
    bytes_[:, :, :bits] = filled
    together = bytes_.view(torch.int64).squeeze(-1)
    codes = torch.empty(rows, n // _TOGETHER, _TOGETHER, dtype=torch.int8, device=packed.device)
    for place in range(_TOGETHER):
        number = (together >> (bits * place)) & ((1 << bits) - 1)
        codes[:, :, place] = number - (1 << (bits - 1))
    return codes.view(rows, n)


def numbers_of_words(packed: Tensor, bits: int) -> Tensor:
    """The unsigned numbers (rows, n), int32, each found in its word or two as the libraries do."""
    import torch

    n = packed.shape[1] // bits * GROUP
    begins = torch.arange(n, device=packed.device) * bits
    word, bit = begins // 32, begins % 32
    unsigned = packed.long() & 0xFFFFFFFF
    following = torch.nn.functional.pad(unsigned, (0, 1))
    both = unsigned[:, word] | following[:, word + 1] << 32
    return (both >> bit & ((1 << bits) - 1)).int()


def chunks(count: int, each: int, multiple: int = 1) -> Iterator[slice]:
    """``count`` rows (or columns) of ``each`` codes in pieces of a bounded size."""
    step = max(1, _CHUNK // (each * multiple)) * multiple
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
