"""A digest of some of the bytes of each weight file, which other weights do not share.

All of a hundred gigabytes takes minutes to read. A few blocks out of every tensor take some
milliseconds, and training changes all of a tensor: whatever was trained, or converted anew, shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.checkpoint.safetensors import Header

# A checkpoint of this many bytes is read whole.
WHOLE_BYTES = 128 << 20
# Otherwise: bytes of a block, the most blocks of a tensor, and about how many of all files.
_BLOCK = 4096
_MOST_OF_A_TENSOR = 4
_BLOCKS = 2048
_THREADS = 16  # for disks and hubs that answer late, and take more than one question at a time


def samples(checkpoint: Checkpoint) -> dict[str, str]:
    """The SHA-256 of a sample of each file: always of the same places, by its header."""
    headers = checkpoint.headers
    whole = checkpoint.total_bytes <= WHOLE_BYTES
    blocks = max(_BLOCKS // len(headers), 16)
    with ThreadPoolExecutor(_THREADS) as pool:
        if whole:
            return dict(zip(headers, pool.map(_digest, headers.values()), strict=True))
        return {name: _sampled(header, blocks, pool) for name, header in headers.items()}


def _digest(header: Header) -> str:
    digest = sha256()
    with header.opened() as pieces:
        for piece in pieces(0, header.file_bytes):
            digest.update(piece)
    return digest.hexdigest()


def _sampled(header: Header, blocks: int, pool: ThreadPoolExecutor) -> str:
    digest = sha256()
    with header.opened() as pieces:

        def block(place: tuple[int, int]) -> bytes:
            return b"".join(map(bytes, pieces(*place)))

        for found in pool.map(block, _places(header, blocks)):
            digest.update(found)
    return digest.hexdigest()


def _places(header: Header, blocks: int) -> Iterator[tuple[int, int]]:
    """Blocks spread evenly over each tensor; over every n-th, where there are too many."""
    tensors = [info for info in header.tensors.values() if info.nbytes]
    step = -(-len(tensors) // blocks)
    for info in tensors[:: step or 1]:
        count = min(_MOST_OF_A_TENSOR, blocks // len(tensors) or 1, -(-info.nbytes // _BLOCK))
        for place in range(count):
            # The middles of so many equal parts: the first and last rows may be special tokens'.
            middle = info.start + info.nbytes * (2 * place + 1) // (2 * count)
            start = max(info.start, min(middle - _BLOCK // 2, info.end - _BLOCK))
            yield start, min(start + _BLOCK, info.end)
