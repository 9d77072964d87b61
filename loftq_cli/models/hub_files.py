"""A hub's weight files by range requests: their tensors are read, and no copy of a file is kept.

    GET https://HUB/ORG/NAME/resolve/COMMIT/FILE      Range: bytes=FIRST-LAST

The hub sends such a request on to where the bytes are; Xet's files answer it as all others do.
Endpoint, session, token, proxies and timeouts are those of huggingface_hub, and so is the waiting
after 429 and 5xx, for as long as `Retry-After` says. A request that is cut short is made again for
what is missing. Every answer is held against the commit, the etag and the size that the file had
when its header was read, so no two versions of it are ever mixed.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from loftq_cli.checkpoint.files import Pieces, corrupt
from loftq_cli.errors import LoftqError, first_line

# Tries in a row that bring nothing, and the seconds before the second and before the last ones:
# some three minutes of a hub that is away.
TRIES = 8
FIRST_WAIT = 1.0
_LONGEST_WAIT = 60.0
_STATUSES = (408, 429, 500, 502, 503, 504)
# What a cut costs at most, and what is held of a tensor beside the tensor itself.
_PIECE_BYTES = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")

_thread = threading.local()


def may_be_abandoned(abandoned: threading.Event) -> None:
    """Lets what this thread reads from hubs, or waits for, end in an error when the event is set.

    A layer takes seconds to arrive, and Ctrl-C does not wait for one that nobody wants any more.
    """
    _thread.abandoned = abandoned


def _wait(seconds: float) -> None:
    """In a thread that may be abandoned, no longer than anyone waits for what it reads."""
    abandoned: threading.Event | None = getattr(_thread, "abandoned", None)
    if abandoned is None:
        time.sleep(seconds)
    elif abandoned.wait(seconds):
        raise LoftqError("nobody waits for this any more")


class Patience:
    """Tries again what the network failed, after longer and longer waits.

    Args:
        tries: how often; none of them brought anything.
        gave_up: what the last error is told as.
    """

    def __init__(self, tries: int, gave_up: Callable[[Exception], LoftqError]) -> None:
        self._tries = tries
        self._gave_up = gave_up
        self._failed = 0

    def rewarded(self) -> None:
        """Something has come: the tries are counted from here."""
        self._failed = 0

    def after(self, error: Exception) -> None:
        """Waits for the next try, unless that was the last one or no other can help."""
        from huggingface_hub.errors import HfHubHTTPError

        if isinstance(error, LoftqError | MemoryError):
            raise error
        self._failed += 1
        # A status that passes has been waited out by then (see `answered`).
        if isinstance(error, HfHubHTTPError) or self._failed > self._tries:
            raise self._gave_up(error) from error
        _wait(min(FIRST_WAIT * 2 ** (self._failed - 1), _LONGEST_WAIT))


class Said(NamedTuple):
    """What an answer says of the file; None where it does not."""

    commit: str | None
    etag: str | None  # of the whole file, whichever host the bytes come from
    first: int | None  # position of the answer's first byte
    file_bytes: int | None


@contextmanager
def answered(url: str, start: int, end: int, *, retries: int) -> Iterator[Any]:
    """The answer to a request for the bytes from ``start`` to ``end``, whose body is still to come.

    Raises:
        HfHubHTTPError: it is none; after ``retries`` if that might have passed.
        Exception: of the HTTP library, which is not the same in all versions of huggingface_hub.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = {
        **build_hf_headers(),
        "Range": f"bytes={start}-{end - 1}",
        "Accept-Encoding": "identity",  # a range of what was compressed would be another one
    }
    with http_stream_backoff(
        "GET",
        url,
        headers=headers,
        max_retries=retries,
        base_wait_time=FIRST_WAIT,
        max_wait_time=_LONGEST_WAIT,
        # It would catch what cuts the body too, and ask again for all of it.
        retry_on_exceptions=(),
        retry_on_status_codes=_STATUSES,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        follow_redirects=True,
    ) as response:
        hf_raise_for_status(response)
        yield response


def said(response: Any) -> Said:
    """What an answer, or the hub before it sent the request on, says of the file."""
    from huggingface_hub import constants

    answers = (*response.history, response)

    def header(name: str) -> str | None:
        return next((each.headers[name] for each in answers if name in each.headers), None)

    # Where the bytes are, the file may go by another etag than in the repository.
    etag = header(constants.HUGGINGFACE_HEADER_X_LINKED_ETAG) or response.headers.get("ETag")
    extent = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return Said(
        header(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT),
        None if etag is None else etag.removeprefix("W/").strip('"'),
        None if extent is None else int(extent[1]),
        None if extent is None else int(extent[3]),
    )


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at one commit, as it was when its header was read.

    Plain data, without a token: whoever reads it takes the token of its own environment.
    """

    endpoint: str
    repository: str
    commit: str
    name: str
    file_bytes: int
    etag: str | None

    @contextmanager
    def opened(self) -> Iterator[Pieces]:
        """See `files.ByteSource`. Nothing is asked for before the first piece is."""
        yield self._pieces

    def _pieces(self, start: int, end: int) -> Iterator[memoryview]:
        patience = Patience(TRIES, self._unread)
        while start < end:
            try:
                for piece in self._answer(start, end):
                    yield piece
                    start += len(piece)
                    patience.rewarded()
                if start < end:
                    raise EOFError("the answer ends before what was asked for")
            except Exception as error:  # of the HTTP library, whose types are none of ours
                patience.after(error)

    def _answer(self, start: int, end: int) -> Iterator[memoryview]:
        """The pieces of one answer, as far as they came whole."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.repository, self.name, revision=self.commit, endpoint=self.endpoint)
        with answered(url, start, end, retries=TRIES) as response:
            self._require_same(response.status_code, said(response), start)
            for chunk in response.iter_bytes(_PIECE_BYTES):
                _wait(0)
                if len(chunk) > end - start:
                    raise self._changed("it sends more bytes than it was asked for")
                if len(chunk) < min(_PIECE_BYTES, end - start):
                    return
                start += len(chunk)
                yield memoryview(bytearray(chunk))

    def _require_same(self, status: int, found: Said, start: int) -> None:
        if status != 206 or found.first != start:
            raise LoftqError(
                f"{self.repository}/{self.name} cannot be read in parts",
                cause=f"{self.endpoint} was asked for a range of it, and answers with another",
                hint="leave --stream out: the files are downloaded then",
            )
        for what, now, before in (
            ("commit", found.commit, self.commit),
            ("etag", found.etag, self.etag),
            ("size", found.file_bytes, self.file_bytes),
        ):
            if None not in (now, before) and now != before:
                raise self._changed(
                    f"its {what} was {before} when its header was read, and is {now}"
                )

    def _unread(self, error: Exception) -> LoftqError:
        return LoftqError(
            f"{self.repository}/{self.name} could not be read to its end",
            cause=first_line(error),
            hint="run the same line again: finished files are kept",
        )

    def _changed(self, reason: str) -> LoftqError:
        hint = "run the same line again; with --force, where a part of it was written already"
        return corrupt(f"{self.repository}/{self.name}", reason, hint)
