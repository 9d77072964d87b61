"""What this box is, and what `auto` becomes on it. Imports torch only to ask it."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from loftq_cli.errors import LoftqError, UsageError

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "lm-eval")


class Choice(NamedTuple):
    value: str
    reason: str


def resolve_device(requested: str) -> Choice:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that torch can use."""
    require_device_name(requested)
    import torch

    if requested == "cpu":
        return Choice("cpu", "asked for")
    if requested == "auto":
        if torch.cuda.is_available():
            return Choice("cuda:0", f"auto: torch sees {torch.cuda.get_device_name(0)}")
        return Choice("cpu", f"auto: {_why_no_cuda(torch)}")
    if not torch.cuda.is_available():
        raise LoftqError(
            f"cannot use --device {requested}", cause=_why_no_cuda(torch), hint="use --device cpu"
        )
    number = int(requested.partition(":")[2] or 0)
    count = torch.cuda.device_count()
    if number >= count:
        seen = "1 CUDA device" if count == 1 else f"{count} CUDA devices"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        limit = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}"
        raise LoftqError(
            f"cannot use --device {requested}",
            cause=f"torch sees {seen}{limit}",
            hint=f"use --device cuda:{count - 1}",
        )
    return Choice(f"cuda:{number}", f"asked for: {torch.cuda.get_device_name(number)}")


def resolve_devices(requested: str) -> list[Choice]:
    """The devices of a run that may use several: `cuda:all` is every GPU, `cuda:0,cuda:2` two."""
    if requested == "cuda:all":
        resolve_device("cuda")
        import torch

        requested = ",".join(f"cuda:{number}" for number in range(torch.cuda.device_count()))
    return [resolve_device(each) for each in requested.split(",")]


def require_device_names(requested: str) -> list[str]:
    """The devices that are named, `cuda:all` as one.

    Raises:
        UsageError: one is no device on any machine, or stands there twice.
    """
    names = requested.split(",")
    if requested != "cuda:all":
        for name in names:
            require_device_name(name)
        if len(names) > 1 and not (all(":" in name for name in names) and _differ(names)):
            raise UsageError(
                f"--device {requested:.100} is no list of different GPUs",
                hint="--device cuda:0,cuda:1, or cuda:all",
            )
    return names


def _differ(names: list[str]) -> bool:
    return len({int(name.partition(":")[2]) for name in names}) == len(names)


def require_device_name(requested: str) -> None:
    """Raises UsageError for what is no device on any machine."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,6})?", requested, re.ASCII):
        raise UsageError(
            f"there is no device {requested!r:.100}", hint="use --device auto, cpu, cuda or cuda:N"
        )


def resolve_dtype(
    requested: str, device: str, stored: str | None = None, *, to_measure: bool = False
) -> Choice:
    """The dtype to compute in. `stored` is the checkpoint's own, where that is known.

    With `to_measure` a CPU computes in float32. Rounding to bfloat16 there costs as much time and
    adds to every KL divergence: 0.00025 to 0.009 for the built-in model.
    """
    if requested != "auto":
        return Choice(requested, "asked for")
    if device == "cpu":
        if to_measure:
            return Choice("float32", "auto: on a CPU, rounding less measures better")
        if stored == "float16":
            # Half-precision kernels on the CPU are missing for some operations and slow for most.
            return Choice("float32", "auto: the checkpoint is float16, which CPUs compute badly")
        if stored in ("float32", "bfloat16"):
            return Choice(stored, "auto: as the checkpoint stores it")
        return Choice("float32", "auto: what every CPU computes well")
    import torch

    if stored in ("float16", "float32"):
        return Choice(stored, "auto: as the checkpoint stores it")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return Choice("float16", "auto: this GPU has no bfloat16")
    if stored == "bfloat16":
        return Choice(stored, "auto: as the checkpoint stores it")
    return Choice("bfloat16", "auto: this GPU has bfloat16")


def _why_no_cuda(torch: Any) -> str:
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    return "torch finds no CUDA device"


def peak_memory_bytes() -> int:
    """The most memory this process has had resident so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss survives exec: started from a large process it would report the parent's peak.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory_bytes(device: str) -> int | None:
    """The most memory torch has held on an accelerator so far; None for a CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(device))


def product_bytes() -> int:
    """Bytes of a number in the sketches: 2 where the processor multiplies bfloat16, else 4.

    As ``core.compiled_step.product_dtype`` has it, without torch; if in doubt 4, which needs more
    memory.
    """
    cpus = Path("/proc/cpuinfo")
    text = cpus.read_text("utf-8", errors="replace") if cpus.exists() else ""
    return 2 if re.search(r"\b(avx512_bf16|amx_tile)\b", text) else 4


def threads() -> int:
    """Threads that torch will use: OMP_NUM_THREADS, or a core each; without torch."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if re.fullmatch(r"[1-9]\d{0,3}", asked, re.ASCII):
        return int(asked)
    return _cpu_count()


def memory_bytes() -> int | None:
    """The memory this process may use: the machine's, or the container's where that is less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    for limit in (
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ):
        try:
            total = min(total, int(limit.read_text(encoding="ascii")))
        except (OSError, ValueError):  # not in a cgroup, or "max"
            continue
    return total


def environment() -> dict[str, Any]:
    """The `environment` of a result document."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": _cpu_count(),
        "memory_bytes": memory_bytes(),
        "packages": versions(PACKAGES),
        "accelerators": _accelerators(),
    }


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    return {name: version for name in packages if (version := _version(name))}


def _accelerators() -> list[dict[str, Any]]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [{"name": each.name, "memory_bytes": each.total_memory} for each in found]
