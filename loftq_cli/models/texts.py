"""Plain text as a model reads it: whole windows of tokens, all of one length.

A text can calibrate, train or evaluate, and never two of them: a score on text that was trained
on proves nothing.
"""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import (
    CorruptCheckpoint,
    InvalidSetting,
    LoftqError,
    UnsupportedModel,
    UsageError,
)
from loftq_cli.models.generation import context_length

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.models.loading import LoadedModel

# Longer windows tell hardly more about a model, and their logits are what takes memory.
LONGEST_WINDOW = 1024
# A text is tokenized whole: this one in half a minute and a few gigabytes.
MOST_BYTES = 32_000_000


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        LoftqError: there is no such file, or it cannot be read.
        InvalidSetting: it is empty, too large, or no text.
    """
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise InvalidSetting(
                f"{path} is no regular file",
                cause="a text is read more than once",
                hint="write it to a file first",
            )
        if status.st_size > MOST_BYTES:
            megabytes = MOST_BYTES // 10**6
            raise InvalidSetting(
                f"{path} is larger than {megabytes} MB",
                cause="it is tokenized whole, and a small part of it does as well",
                hint=f"head -c {megabytes}MB {path} | iconv -c -f utf-8 -t utf-8 > text.txt",
            )
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LoftqError(f"{path} cannot be read", cause=error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise InvalidSetting(
            f"{path} is not a text file",
            cause=f"byte {error.start} is not UTF-8",
            hint=f"iconv -c -f utf-8 -t utf-8 {path} > text.txt, or -f with its own encoding",
        ) from None
    if not text.strip():
        raise InvalidSetting(f"{path} is empty", hint="a few hundred kilobytes of text do well")
    if "\0" in text:
        raise InvalidSetting(f"{path} is not a text file", cause="it has zero bytes in it")
    return text


def digest(text: str) -> str:
    """What a text that was read is known by."""
    return hashlib.sha256(text.encode()).hexdigest()


def require_different(texts: dict[str, Path | None]) -> None:
    """Refuses one file in two roles; ``texts`` maps options to what they name.

    Raises:
        UsageError: two options name the same file, or files of the same content.
    """
    given = [(option, path) for option, path in texts.items() if path is not None]
    for number, (option, path) in enumerate(given):
        for other, earlier in given[:number]:
            if is_same(path, earlier):
                raise UsageError(
                    f"{other} and {option} are the same text",
                    cause="what a model was fitted to cannot say how good it is",
                    hint=f"give {option} another file",
                )


def is_same(one: Path, two: Path) -> bool:
    """Whether both are the same text."""
    try:
        # As they are read: line ends and a byte-order mark make no other text of one.
        return one.samefile(two) or read_text(one) == read_text(two)
    except (OSError, LoftqError):
        return False  # whoever reads it says so


def text_windows(
    loaded: LoadedModel, text: str, name: str, limit: int | None = None, longest: int | None = None
) -> Tensor:
    """Token ids (windows × length), one window after the other; a rest that fills none is dropped.

    ``limit`` tokens at most are taken, evenly from all of the text. ``name`` is for the errors, and
    no window is longer than ``longest``.
    Where the tokenizer begins texts with a token of its own, every window begins with it: some
    models (Gemma) predict nothing sensible without.

    Raises:
        UnsupportedModel: there is no tokenizer.
        InvalidSetting: the text does not fill one window.
        CorruptCheckpoint: the tokenizer is another model's.
    """
    import torch

    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise UnsupportedModel("this model has no tokenizer", cause="there is no tokenizer.json")
    most = longest or LONGEST_WINDOW
    length = min(context_length(loaded.model) or most, most, LONGEST_WINDOW)
    if length < 2:
        raise UnsupportedModel(
            "this model reads one token at a time", cause="so nothing of a text is predicted"
        )
    beginning = _beginning(tokenizer)
    fresh = length - len(beginning)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    count = len(ids) // fresh
    if count == 0:
        raise InvalidSetting(
            f"{name} is too short",
            cause=f"it has {len(ids)} tokens, and this model's windows have {fresh}",
            hint="give it more text",
        )
    whole = ids[: count * fresh].view(count, fresh).long()
    wanted = count if limit is None else max(limit // fresh, 1)
    if wanted < count:
        whole = whole[torch.linspace(0, count - 1, wanted).round().long()]
    first = torch.tensor(beginning, dtype=whole.dtype).expand(len(whole), len(beginning))
    windows = torch.cat([first, whole], dim=1)
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    if (largest := int(windows.max())) >= rows:
        raise CorruptCheckpoint(
            "the tokenizer is not this model's",
            cause=f"it has a token {largest}, and the model's embedding {rows} rows",
            hint="download the model's own tokenizer files",
        )
    return windows


def _beginning(tokenizer: Any) -> list[int]:
    """The token that this tokenizer puts before every text, if it does."""
    ids = tokenizer("")["input_ids"][:1]
    return ids if ids == [tokenizer.bos_token_id] else []
