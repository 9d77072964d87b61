"""What a command can be asked for: its options and their defaults, as plain values.

`commands` makes command lines of these classes, and what is asked for in Python, or advised in a
report, is an object of the same class.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from loftq_cli.errors import UsageError
from loftq_cli.formats import (
    ALL_LINEAR,
    DEFAULT_BLOCK_SIZE,
    DEFAULT_CONTAINER,
    DEFAULT_STORAGE,
    DTYPE_NAMES,
    AdapterDtype,
    CalibrationOrder,
    EngineName,
    Experts,
    QuantStorage,
    QuantType,
    SvdMethod,
)

Asked = TypeVar("Asked", bound="Options")


class Options:
    """The options of one command; a subclass is a frozen dataclass."""

    command: ClassVar[str]

    @classmethod
    def like(cls: type[Asked], settings: Iterable[tuple[str, Any]], **changed: Any) -> Asked:
        """These settings, as far as the command has an option of the name, and what is changed."""
        names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        known = {name: value for name, value in settings if name in names and value is not None}
        return cls(**{**known, **changed})

    def command_line(self, *first: str) -> str:
        """What to type for the same.

        The options called ``first`` come first and are written even where they are the default.
        The others follow where they are not, the output at the end.
        """
        defaults = {field.name: field.default for field in fields(self)}  # type: ignore[arg-type]
        rest = [
            name
            for name, default in defaults.items()
            if name not in first and _text(getattr(self, name)) != _text(default)
        ]
        words = ["loftq", self.command]
        for name in (*first, *sorted(rest, key=lambda name: name == "output")):
            value = getattr(self, name)
            if value is not None and value is not False:
                words.append(f"--{name.replace('_', '-')}")
            if value is not None and not isinstance(value, bool):
                words.append(shlex.quote(_text(value)))
        return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(Options):
    """Of `quantize`. ``bits`` is 2, 3, 4, 8 or, for other bits in the first blocks, "4x8,2"."""

    command = "quantize"

    model: str = "demo"
    output: Path | None = None
    bits: str | int | None = None  # 4
    target_bits: float | None = None
    container: str = DEFAULT_CONTAINER
    quant_type: QuantType = "nf4"
    block_size: int = DEFAULT_BLOCK_SIZE
    double_quant: bool = False
    quant_storage: QuantStorage = DEFAULT_STORAGE
    experts: Experts | None = None  # as the container has it
    init: str = "loftq"
    calibration_text: Path | None = None
    calibration_order: CalibrationOrder | None = None  # sequential, where the start takes it
    distill_steps: int | None = None
    rank: int = 16
    rank_budget: bool = False
    uniform_rank: bool = False
    iterations: str | int = "auto"
    svd: SvdMethod = "auto"
    lora_alpha: float | None = None  # the rank
    rslora: bool = False
    target_modules: str | Sequence[str] = ALL_LINEAR
    adapter_dtype: AdapterDtype = "float32"
    device: str = "auto"
    dtype: str = "auto"
    engine: EngineName = "local"
    ray_address: str = "auto"
    workers: int | None = None  # 1, or one a GPU
    max_memory: str | int | None = None
    stream: bool = False
    seed: int = 0
    dry_run: bool = False
    preflight: bool = False
    resume: bool = False
    force: bool = False
    verify: bool = False
    push_to_hub: str | None = None
    private: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Options):
    """Of `sweep-ranks`."""

    command = "sweep-ranks"

    model: str = "demo"
    ranks: str = "4,8,16,32,64"
    target_modules: str | Sequence[str] = ALL_LINEAR
    bits: int = 4
    container: str = DEFAULT_CONTAINER
    quant_type: QuantType = "nf4"
    block_size: int = DEFAULT_BLOCK_SIZE
    batch_size: int = 1
    sequence_length: int | None = None
    vram: str | None = None
    error: bool = False
    calibration_text: Path | None = None
    device: str = "auto"
    preflight: bool = False


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options):
    """Of `compare`. ``init``, ``bits``, ``container``, ``block_size``, ``experts``,
    ``ranks``, ``tasks`` and ``learning_rate`` are lists with commas."""

    command = "compare"

    model: str = "demo"
    init: str | None = None
    bits: str = "4"
    container: str = DEFAULT_CONTAINER
    ranks: str = "16"
    text: Path | None = None
    calibration_text: Path | None = None
    experts: str | None = None
    tasks: str | None = None
    train_text: Path | None = None
    train_steps: int | None = None
    learning_rate: str | None = None
    seeds: int | None = None
    quant_type: QuantType = "nf4"
    block_size: str | int = DEFAULT_BLOCK_SIZE
    double_quant: bool = False
    iterations: str = "auto"
    lora_alpha: float | None = None
    rslora: bool = False
    target_modules: str | Sequence[str] = ALL_LINEAR
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(value)
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


# --- how the values are read ---------------------------------------------------------------------


def items(value: str | Sequence[str], option: str) -> list[str]:
    """`a,b` as ["a", "b"]; spaces around the commas do not count, an empty item is a mistake."""
    found = [each.strip() for each in (value.split(",") if isinstance(value, str) else value)]
    if not all(found):
        raise UsageError(f"{option} has an empty item: {value!r:.80}")
    return found


def refuse_both(*, force: bool, resume: bool) -> None:
    """--force and --resume want opposite things of an output that is there.

    Raises:
        UsageError: both were asked for.
    """
    if force and resume:
        raise UsageError("--force replaces the output, --resume accepts it: choose one")


def block_sizes(value: str | int) -> list[int]:
    """The value of --block-size where it is a list: whole numbers, each once."""
    found = items(str(value), "--block-size")
    if not all(re.fullmatch(r"-?\d{1,5}", each, re.ASCII) for each in found):
        raise UsageError(
            f"--block-size takes whole numbers, not {value!r:.80}", hint="--block-size 32,64,128"
        )
    return list(dict.fromkeys(map(int, found)))


# No layer of any model has room for it.
LARGEST_RANK = 1_000_000
# What torch's generators take.
LARGEST_SEED = 2**63 - 1


def require_text(option: str, value: str) -> None:
    """Refuses what no option can mean: nothing at all, and what is no text.

    Raises:
        UsageError
    """
    if not value:
        raise UsageError(f"{option} is empty", hint=f"give {option} a value, or leave it out")
    if "\0" in value:
        raise UsageError(f"{option} has a zero byte in it", cause="no file is called so")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{option} {value:.200} is not UTF-8",
            cause="neither a result document nor a model's files could name it",
            hint="write it in UTF-8 (a file or directory: with `mv`, or through a link)",
        ) from None


def ranks(text: str) -> list[int]:
    """The value of --ranks: positive whole numbers, in the order given, each once."""
    found = items(text, "--ranks")
    if not all(re.fullmatch(r"0*[1-9]\d{0,6}", each, re.ASCII) for each in found) or any(
        int(each) > LARGEST_RANK for each in found
    ):
        raise UsageError(
            f"--ranks takes whole numbers from 1 to {LARGEST_RANK}, not {text!r:.80}",
            hint="--ranks 8,16",
        )
    return list(dict.fromkeys(int(each) for each in found))


def learning_rates(text: str) -> list[float]:
    """The value of --learning-rate: numbers above zero, in ascending order, each once."""
    try:
        found = sorted({float(each) for each in items(text, "--learning-rate")})
    except ValueError:
        found = []
    if not found or not all(math.isfinite(each) and each > 0 for each in found):
        raise UsageError(
            f"--learning-rate takes numbers above 0, not {text!r:.80}",
            hint="--learning-rate 2e-4,1e-3",
        )
    return found


def iterations(value: str | int) -> int | None:
    """The value of --iterations: a positive whole number, or None for auto."""
    text = str(value)
    if text == "auto":
        return None
    if not (re.fullmatch(r"[1-9]\d{0,3}", text, re.ASCII) and int(text) <= 1000):
        raise UsageError(
            f"--iterations takes auto or a number from 1 to 1000, not {text!r:.80}",
            hint="--iterations auto",
        )
    return int(text)


def choice(value: str, option: str, names: Sequence[str]) -> None:
    """Refuses what is none of the names."""
    if value not in names:
        raise UsageError(
            f"{option} takes {', '.join(names)}, not {value!r:.80}", hint=f"{option} {names[0]}"
        )


def dtype(value: str) -> str | None:
    """The value of --dtype: torch's name of one, or None for auto."""
    names = list(DTYPE_NAMES.values())
    if value not in ("auto", *names):
        raise UsageError(f"--dtype takes auto, {', '.join(names)}, not {value!r:.80}")
    return None if value == "auto" else value


_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def size(value: str | int, option: str, *, plain_bytes: bool = False) -> int:
    """`24GB` as 24·10⁹, `24GiB` as 24·2³⁰ bytes; ``plain_bytes`` may be a number without unit."""
    stripped = str(value).strip().upper()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT]I?B)", stripped, re.ASCII)
    if plain_bytes and re.fullmatch(r"0*[1-9]\d{0,18}", stripped, re.ASCII):
        return int(stripped)
    count = 0 if match is None else float(match[1]) * _UNITS[match[2]]
    if not 1 <= count < 2**63:
        raise UsageError(f"{option} takes a size such as 24GB or 22.5GiB, not {value!r:.80}")
    return int(count)
