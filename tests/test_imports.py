"""What starting costs: help and version import nothing heavy, and no library is imported early."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys

import pytest

from loftq_cli.errors import LoftqError
from loftq_cli.libraries import importing

# fmt: off
HEAVY = {
    "accelerate", "bitsandbytes", "huggingface_hub", "numba", "numpy", "peft", "pydantic", "rich",
    "safetensors", "torch", "transformers",
}
# fmt: on

WATCH = """
import sys
from loftq_cli.cli import main
main({argv})
print("\\nimported:", *sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


def imported_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.partition("imported:")[2].split())


@pytest.mark.parametrize("argv", [["--help"], ["--version"]])
def test_help_and_version_import_nothing_heavy(argv: list[str]) -> None:
    assert not imported_by(WATCH.format(argv=argv)) & HEAVY


@pytest.mark.parametrize("command", ["quantize", "load", "generate"])
def test_the_help_of_a_command_imports_no_torch(command: str) -> None:
    # Typer itself imports pydantic for every command line that is more than its own help.
    assert imported_by(WATCH.format(argv=[command, "--help"])) & HEAVY <= {"pydantic"}


def test_no_garbage_is_looked_for_while_libraries_are_imported() -> None:
    assert gc.isenabled()
    with importing():
        assert not gc.isenabled()
        with importing():
            pass
        assert not gc.isenabled()
    with pytest.raises(LoftqError), importing():
        raise LoftqError("")
    assert gc.isenabled()


def test_the_end_of_a_command_does_not_look_through_all_there_is() -> None:
    code = """
import atexit, gc, sys
atexit.register(lambda: print("imported:", gc.get_count()[0] < 1000 < gc.get_freeze_count()))
sys.argv[1:] = ["--version"]
from loftq_cli.__main__ import main
main()
"""
    assert imported_by(code) == {"True"}


def test_the_public_face_imports_nothing_heavy() -> None:
    code = "import sys; from loftq_cli import quantize, verify\nprint('imported:', *sys.modules)"
    assert not imported_by(code) & {*HEAVY, "typer"}


def test_reading_and_rendering_documents_imports_no_tensor_library() -> None:
    code = """
import importlib, pkgutil, sys
import loftq_cli.report, loftq_cli.schema, loftq_cli.hardware, loftq_cli.console
for module in pkgutil.iter_modules(loftq_cli.report.__path__):
    importlib.import_module(f"loftq_cli.report.{module.name}")
loftq_cli.hardware.environment()
print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""
    assert imported_by(code) & HEAVY <= {"pydantic"}


def cpu_seconds(*command: str) -> float:
    """The CPU time of a child process: unlike the wall clock it does not count the neighbours."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("argv", [["--version"], ["--help"]])
def test_starting_takes_at_most_three_times_what_importing_typer_takes(argv: list[str]) -> None:
    # The best of several: whatever else runs on the box only ever adds.
    typer = min(cpu_seconds("-c", "import typer") for _ in range(4))
    loftq = min(cpu_seconds("-m", "loftq_cli", *argv) for _ in range(4))
    assert loftq < 3 * typer


def test_bitsandbytes_comes_without_the_compiler_until_a_fallback_is_called() -> None:
    code = """
import sys, torch
from loftq_cli.libraries import import_bitsandbytes

compile_now, called = torch.compile, []
torch.compile = lambda function, **options: called.append(function) or function
import_bitsandbytes()
assert not called
from bitsandbytes.backends.default import ops
late = [each for each in vars(ops).values() if getattr(each, "__wrapped__", None)]
values = torch.ones(2, 4)
try:
    late[-1](values)
except TypeError:  # it takes other arguments, and was compiled all the same
    pass
assert len(called) == 1
print("imported:", *(name for name in sys.modules if name.startswith("torch._inductor.compile")))
"""
    assert not imported_by(code)
