"""A repository of the Hugging Face hub to write to, through huggingface_hub's own HfApi.

Endpoint, token and proxies are those of huggingface_hub. The token is never shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loftq_cli.engines.report_file import Report, read_report
from loftq_cli.errors import LoftqError, OutputExists, PushFailed, UsageError, first_line
from loftq_cli.models.source import README_FILE, REPORT_FILE
from loftq_cli.models.spec import is_offline
from loftq_cli.record import Record
from loftq_cli.report.units import listed
from loftq_cli.schema import WrittenFile

# What a hub itself puts into a new repository.
_THE_HUBS = {".gitattributes"}
_LOG_IN = "log in with `hf auth login`, or give a token with write access in HF_TOKEN"


def require_pushable(repository: str) -> None:
    """Finds out before any work what is known without asking the hub.

    Raises:
        UsageError: the name is not one of a repository.
        PushFailed: the environment forbids the network, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        cause = None if "/" in repository else "it names no user or organization"
    except HFValidationError as error:
        cause = first_line(error)
    if cause is not None:
        raise UsageError(
            f"'{repository:.120}' is no name of a repository",
            cause=cause,
            hint="NAMESPACE/NAME, such as your-name/your-model; `hf auth whoami` tells yours",
        )
    if is_offline():
        raise PushFailed(
            f"cannot push to '{repository}'",
            cause="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network",
            hint="unset it, then run `loftq push`",
        )
    if get_token() is None:
        raise PushFailed(
            f"cannot push to '{repository}'", cause="nobody is logged in", hint=_LOG_IN
        )


class Repository:
    """One repository, which is there when this has been made.

    Raises:
        OutputExists: it is public, and was to be private.
        PushFailed: the hub did not answer, or does not let us.
    """

    def __init__(self, name: str, *, private: bool) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        self.name = name
        self._api = HfApi()
        self.url = f"{self._api.endpoint}/{name}"
        with self._told():
            try:
                info = self._api.repo_info(name)
            except RepositoryNotFoundError:
                # Without --private an organization's own default decides.
                self._api.create_repo(name, private=private or None, exist_ok=True)
                info = self._api.repo_info(name)
        self.private = bool(info.private)
        self._parent = info.sha
        self.files = [each.rfilename for each in info.siblings or ()]
        if private and not self.private:
            raise OutputExists(
                f"{self.url} is public, and --private was asked for",
                cause="a push changes nothing about who sees a repository",
                hint="make it private on its page, or push to another",
            )

    def stale(self, report: Report, *, force: bool) -> list[str]:
        """The files of another output that are there and are no part of this one.

        Raises:
            OutputExists: the repository has something else in it, and ``force`` is not given.
        """
        there = self._report() if REPORT_FILE in self.files else None
        others = set(self.files) - _THE_HUBS
        if not others or (there is not None and _same_run(there, report)):
            return []
        if not force:
            first = listed(sorted(others)[:3])
            raise OutputExists(
                f"{self.url} has something else in it",
                cause=f"what is there was not made by the run that made this: {first}"
                if there is None
                else f"its {REPORT_FILE} is of another run",
                hint="push to another repository; --force replaces what loftq wrote there and adds "
                "to the rest",
            )
        written = set() if there is None else {each.name for each in there.results.files}
        ours = {each.name for each in report.results.files} | {REPORT_FILE}
        return sorted(others & written - ours)

    def commit(
        self,
        directory: Path,
        files: Sequence[WrittenFile],
        contents: Mapping[str, bytes],
        deleted: Sequence[str],
        message: str,
        record: Record,
    ) -> str:
        """Sends the files and makes them one commit, which has all of them or is none.

        What an interrupted push has sent is not sent again.

        Args:
            files: with the hashes that they have to have.
            contents: of those that are not on the disk as they are sent.

        Returns:
            the commit.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard

        additions = []
        with self._told(), record.progress("uploading", len(files)) as progress:
            # The hub's own opinion, before anything large is sent.
            ModelCard(contents[README_FILE].decode()).validate()
            for file in files:
                progress.start(file.name)
                content = contents.get(file.name)
                addition = CommitOperationAdd(
                    file.name, directory / file.name if content is None else content
                )
                self._api.preupload_lfs_files(self.name, [addition], free_memory=False)
                if addition.upload_info.sha256.hex() != file.sha256:
                    raise PushFailed(f"{directory / file.name} changed while it was sent")
                additions.append(addition)
                progress.advance(file.name)
            made = self._api.create_commit(
                self.name,
                [*additions, *(CommitOperationDelete(name) for name in deleted)],
                commit_message=message,
                parent_commit=self._parent,
            )
        return str(made.oid)

    def _report(self) -> Report | None:
        """That of the output which is there; None if it is no such."""
        from huggingface_hub import hf_hub_download

        with self._told():
            path = Path(hf_hub_download(self.name, REPORT_FILE, revision=self._parent))
        try:
            return read_report(path.parent)
        except LoftqError:
            return None

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except LoftqError:
            raise
        except Exception as error:  # of the HTTP library, of the hub's, of its validator
            raise _failed(self.name, error) from error


def _same_run(one: Report, other: Report) -> bool:
    def identity(report: Report) -> Any:
        return report.model, report.results.fingerprint, report.results.settings

    return bool(identity(one) == identity(other))


def _failed(name: str, error: BaseException) -> PushFailed:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # of one file's upload, which says only which
    status = getattr(getattr(error, "response", None), "status_code", None)
    cause, hint = first_line(error), "run it again: what has arrived is not sent twice"
    if isinstance(error, ValueError) and status is None:
        cause = " ".join(str(error).split())
    if status == 401:
        cause, hint = "the hub does not take the token", _LOG_IN
    elif status in (403, 404):
        cause = "the token may not write there"
        hint = f"`hf auth whoami` tells the namespaces that are yours; {_LOG_IN}"
    return PushFailed(f"could not push to '{name}'", cause=cause, hint=hint)
