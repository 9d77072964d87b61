"""The files that belong to a model beside its weights: which are copied, and why others are not.

Every small file of the source goes with the output, in whatever folder it lies: a sentence
embedding model is not the same model without its `1_Pooling/config.json`. Left out are weights,
pickles, code that nobody agreed to, what is hidden, and what the output has of its own.

What is copied may be published with the output. So a link is followed only to where it stays in
the model: below its directory or, in the hub's cache, in the blobs of the same repository.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from loftq_cli.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_DIRECTORY
from loftq_cli.checkpoint.files import read_file
from loftq_cli.checkpoint.index import INDEX_FILE, MAX_CONFIG_BYTES, SINGLE_FILE
from loftq_cli.checkpoint.safetensors import strict_json
from loftq_cli.errors import CorruptCheckpoint
from loftq_cli.models.source import (
    CONFIG_FILE,
    MERGE_FILE,
    PICKLE_SUFFIXES,
    README_FILE,
    REPORT_FILE,
)

MODULES_FILE = "modules.json"  # of sentence embedding models

# What is small: the largest tokenizers have some 35 MB, the dense layers of embedding models 50.
MOST_BYTES = 100_000_000  # of one file
MOST_BYTES_TOGETHER = 1_000_000_000
MOST_FILES = 1_000
_MOST_FOLDERS = 1_000
_DEEPEST = 16
_LONGEST_NAME = 200  # bytes: while it is written, a file has a longer name yet

# The files that decide which tokens a text has.
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)

_PICKLES = {*PICKLE_SUFFIXES, ".pickle", ".joblib", ".nemo", ".mar"}
_WEIGHTS = {
    *(".safetensors", ".h5", ".hdf5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".gguf"),
    *(".ggml", ".ggjt", ".tflite", ".mlmodel", ".pb", ".ot", ".engine", ".pte", ".distcp"),
}
_CODE = {
    *(".py", ".pyc", ".pyo", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".ps1"),
    *(".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".js", ".jar", ".wasm", ".ipynb"),
}
_INDEX = re.compile(r"\.(safetensors|bin|h5|msgpack|ckpt|onnx)\.index(\..+)?$")
# Folders that hold the model once more: for other programs, or as it was during its training.
_OTHER_MODELS = re.compile(
    r"onnx|openvino|coreml|tflite|gguf|checkpoint-\d+|.*\.(mlpackage|safetensors)"
)
_OURS = {
    name.casefold()
    for name in (
        CONFIG_FILE,
        INDEX_FILE,
        SINGLE_FILE,
        README_FILE,
        REPORT_FILE,
        MERGE_FILE,
        ADAPTER_DIRECTORY,
    )
}

HIDDEN = "hidden, or a cache"
OWN = "loftq writes its own"
PICKLE = "a pickle, which runs code when it is opened"
WEIGHTS = "weights that are not those of the model itself"
CODE = "code, which is copied with --trust-remote-code only"
OTHER_MODEL = "a copy of the model for other programs, or from its training"
OTHER_ADAPTER = "transformers would load the adapter that it describes"
OUTWARD_LINK = "a link that leads out of the model"
NOWHERE = "a link that leads nowhere, or in a circle"
SPECIAL = "not a regular file"
UNREADABLE = "it cannot be read"
ODD_NAME = "its name is not UTF-8, too long, or has characters that cannot be printed"
TOO_DEEP = f"more than {_DEEPEST} folders deep"
TOO_LARGE = f"larger than {MOST_BYTES // 10**6} MB"
TOO_MANY = f"after {MOST_FILES:,} files or {MOST_BYTES_TOGETHER // 10**9} GB of others"
# What nobody expects in the output.
_EXPECTED = {HIDDEN, OWN, PICKLE, WEIGHTS, CODE, OTHER_MODEL, OTHER_ADAPTER}


@dataclass(frozen=True)
class Companion:
    """A file to copy: its ``name`` below the directory, and where it lies behind all links."""

    name: str
    path: Path
    bytes: int


@dataclass(frozen=True)
class LeftOut:
    """What is not copied; a folder stands for all that is in it."""

    name: str
    reason: str


@dataclass
class Companions:
    """What goes with the weights. ``empty`` are folders without anything in them.

    ``modules`` are the folders that a sentence embedding model is put together from.
    """

    files: list[Companion] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    modules: frozenset[str] = frozenset()

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.files)

    @property
    def tokenizer(self) -> list[Companion]:
        """Those that decide which tokens a text has."""
        top = [each for each in self.files if "/" not in each.name]
        return [each for each in top if any(fnmatch(each.name, like) for like in TOKENIZER)]

    @property
    def missed(self) -> list[LeftOut]:
        """What was left out though the output may not be complete, or not be legal, without it."""
        whole = {_folder(each.name) for each in self.files if _is_weights(each.name)}
        return [
            each
            for each in self.left_out
            if each.reason not in _EXPECTED
            or (
                each.reason == PICKLE
                and _is_in(each.name, self.modules)
                and _folder(each.name) not in whole
            )
        ]


def companions(
    directory: Path,
    *,
    with_code: bool,
    weights: Iterable[str] = (),
    not_fetched: Iterable[LeftOut] = (),
) -> Companions:
    """What goes with the weights of the model in ``directory``; no file is opened but one.

    That is `modules.json`, of a sentence embedding model: weights in the folders that it names are
    part of the model.

    Args:
        with_code: Python files and other code too.
        weights: names of the model's own weight files, which are nothing to tell of.
        not_fetched: what the model's repository has more than the directory (see `wanted`).
    """
    walk = _Walk(directory, with_code, frozenset(weights))
    walk.folder(walk.root, "", ())
    found = walk.found
    known = {*walk.weights, *(each.name for each in found.files)}
    known |= {each.name for each in found.left_out}
    found.left_out += [each for each in not_fetched if each.name not in known]
    return found


def why_not(name: str, size: int, *, with_code: bool, modules: Collection[str]) -> str | None:
    """Why a file is not copied, by its name below the directory and its bytes; None: it is.

    ``modules`` are the folders whose weights are part of the model.
    """
    *folders, last = PurePosixPath(name).parts
    if _is_odd(name):
        return ODD_NAME
    if any(part.startswith(".") or part == "__pycache__" for part in (*folders, last)):
        return HIDDEN
    if (folders[0] if folders else last).casefold() in _OURS:
        return OWN
    if any(_OTHER_MODELS.fullmatch(folder) for folder in folders):
        return OTHER_MODEL
    if name == ADAPTER_CONFIG:
        return OTHER_ADAPTER
    suffix = PurePosixPath(last.lower()).suffix
    if suffix in _CODE and not with_code:
        return CODE
    if suffix in _PICKLES:
        return PICKLE
    if _INDEX.search(last) or (
        suffix in _WEIGHTS and not (_is_weights(name) and _is_in(name, modules))
    ):
        return WEIGHTS
    return TOO_LARGE if size > MOST_BYTES else None


def wanted(sizes: Mapping[str, int], *, with_code: bool) -> tuple[list[str], list[LeftOut]]:
    """Of the files of a repository, by their bytes: those to fetch, and those to leave there."""
    # What modules.json says is not known yet; where there is one, few folders have other weights.
    modules = {name.partition("/")[0] for name in sizes if MODULES_FILE in sizes and "/" in name}
    names: list[str] = []
    left: list[LeftOut] = []
    total = 0
    for name, size in sorted(sizes.items()):
        if name in (CONFIG_FILE, INDEX_FILE):
            continue
        reason = why_not(name, size, with_code=with_code, modules=modules)
        if reason is None and any(mark in name for mark in "*?"):
            reason = ODD_NAME  # it would be taken for a pattern
        if reason is None and (len(names) >= MOST_FILES or total + size > MOST_BYTES_TOGETHER):
            reason = TOO_MANY
        if reason is None:
            names.append(name)
            total += size
        else:
            left.append(LeftOut(_printable(name), reason))
    return names, left[:MOST_FILES]


class _Walk:
    def __init__(self, directory: Path, with_code: bool, weights: frozenset[str]) -> None:
        self.root = Path(os.path.realpath(directory))
        self.found = Companions()
        self._blobs = _blobs_of(self.root)
        self._with_code = with_code
        self.weights = weights
        self._folders = 0
        self._bytes = 0
        modules = self.root / MODULES_FILE
        if self._is_inside(Path(os.path.realpath(modules))):
            self.found.modules = _modules(modules)

    def folder(self, place: Path, name: str, above: tuple[Path, ...]) -> None:
        """Looks at all that is in the folder ``place``, which is called ``name``."""
        self._folders += 1
        if place in above:
            self._leave(name, NOWHERE)
        elif len(above) > _DEEPEST:
            self._leave(name, TOO_DEEP)
        elif self._folders > _MOST_FOLDERS:
            self._leave(name, TOO_MANY)
        else:
            try:
                entries = sorted(path.name for path in place.iterdir())
            except OSError:
                self._leave(name, UNREADABLE)
                return
            if name and not entries:
                self.found.empty.append(name)
            for entry in entries:
                self._entry(place / entry, f"{name}/{entry}" if name else entry, (*above, place))

    def _entry(self, path: Path, name: str, above: tuple[Path, ...]) -> None:
        if name in self.weights or name in (CONFIG_FILE, INDEX_FILE):
            return  # what the output is made from
        # What the name alone forbids is not looked at.
        reason = self._why_not(name, 0)
        if reason in (ODD_NAME, HIDDEN, OWN):
            self._leave(name, reason)
            return
        try:
            real = Path(os.path.realpath(path, strict=True))
            status = real.stat()
        except OSError:
            self._leave(name, NOWHERE if path.is_symlink() else UNREADABLE)
            return
        if not self._is_inside(real):
            self._leave(name, OUTWARD_LINK)
        elif stat.S_ISDIR(status.st_mode):
            if self._why_not(f"{name}/-", 0) is not None:
                self._leave(name, OTHER_MODEL)
            else:
                self.folder(real, name, above)
        elif not stat.S_ISREG(status.st_mode):
            self._leave(name, SPECIAL)
        elif reason := self._why_not(name, status.st_size):
            self._leave(name, reason)
        elif not os.access(real, os.R_OK):
            self._leave(name, UNREADABLE)
        elif (
            len(self.found.files) >= MOST_FILES
            or self._bytes + status.st_size > MOST_BYTES_TOGETHER
        ):
            self._leave(name, TOO_MANY)
        else:
            self.found.files.append(Companion(name, real, status.st_size))
            self._bytes += status.st_size

    def _why_not(self, name: str, size: int) -> str | None:
        return why_not(name, size, with_code=self._with_code, modules=self.found.modules)

    def _is_inside(self, real: Path) -> bool:
        """Whether a file is the model's, and not in `.git`, say, whose config may have a token."""
        if self._blobs is not None and self._blobs in real.parents:
            return True
        if self.root != real and self.root not in real.parents:
            return False
        return not any(part.startswith(".") for part in real.relative_to(self.root).parts)

    def _leave(self, name: str, reason: str) -> None:
        left = self.found.left_out
        if len(left) < MOST_FILES:
            left.append(LeftOut(_printable(name), reason))
        elif left[-1].name != "…":
            left.append(LeftOut("…", "there is more than is listed here"))


def _blobs_of(root: Path) -> Path | None:
    """Where the files of a snapshot in the hub's cache lie (see `spec.cached_model`)."""
    snapshots = root.parent
    if snapshots.name != "snapshots" or not snapshots.parent.name.startswith("models--"):
        return None
    return snapshots.parent / "blobs"


def _modules(path: Path) -> frozenset[str]:
    """The folders that `modules.json` names; none if there is no such file, or it is another's."""
    try:
        listed = strict_json(read_file(path, MAX_CONFIG_BYTES))
    except (CorruptCheckpoint, ValueError, RecursionError):
        return frozenset()
    if not isinstance(listed, list):
        return frozenset()
    paths = (each.get("path") for each in listed if isinstance(each, dict))
    return frozenset(str(PurePosixPath(path)) for path in paths if isinstance(path, str) and path)


def _folder(name: str) -> str:
    return str(PurePosixPath(name).parent)


def _is_in(name: str, folders: Collection[str]) -> bool:
    return any(name.startswith(f"{folder}/") for folder in folders)


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _is_odd(name: str) -> bool:
    """Whether a report cannot list the name, or a file cannot be written under it."""
    try:
        longest = max(len(part.encode()) for part in name.split("/"))
    except UnicodeEncodeError:
        return True
    return longest > _LONGEST_NAME or "\\" in name or not name.isprintable()


def _printable(name: str) -> str:
    """Any name as text that every document can hold."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else ascii(text)[1:-1]
