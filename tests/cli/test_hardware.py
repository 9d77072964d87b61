"""What `auto` becomes on which box, each time with the reason."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest

from loftq_cli import hardware
from loftq_cli.errors import LoftqError, UsageError
from loftq_cli.schema import Environment


class FakeCuda(SimpleNamespace):
    def is_available(self) -> bool:
        return self.devices > 0

    def device_count(self) -> int:
        return self.devices

    def get_device_name(self, number: int) -> str:
        return f"Fake GPU {number}"

    def get_device_properties(self, number: int) -> SimpleNamespace:
        return SimpleNamespace(name=f"Fake GPU {number}", total_memory=24 * 1024**3)

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        assert not including_emulation
        return self.bf16


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    fake = ModuleType("torch")
    fake.__version__ = "2.99"
    fake.version = SimpleNamespace(cuda="12.8")
    fake.cuda = FakeCuda(devices=2, bf16=True)
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_devices_where_there_are_gpus(torch: ModuleType) -> None:
    assert hardware.resolve_device("auto") == ("cuda:0", "auto: torch sees Fake GPU 0")
    assert hardware.resolve_device("cuda") == ("cuda:0", "asked for: Fake GPU 0")
    assert hardware.resolve_device("cuda:1") == ("cuda:1", "asked for: Fake GPU 1")
    assert hardware.resolve_device("cpu") == ("cpu", "asked for")


def test_several_devices(torch: ModuleType) -> None:
    every = [each.value for each in hardware.resolve_devices("cuda:all")]
    assert every == ["cuda:0", "cuda:1"]
    assert hardware.resolve_devices("cuda:1,cuda:0")[0] == ("cuda:1", "asked for: Fake GPU 1")
    assert [each.value for each in hardware.resolve_devices("cpu")] == ["cpu"]
    with pytest.raises(LoftqError, match="cuda:2"):
        hardware.resolve_devices("cuda:0,cuda:2")


@pytest.mark.parametrize(
    "names", ["cuda:0,", "cpu,cuda:0", "cuda,cuda:1", "cuda:1,cuda:01", "all", "cuda:all,cuda:0"]
)
def test_what_is_no_list_of_devices(names: str) -> None:
    with pytest.raises(UsageError, match=r"no device|no list of different GPUs"):
        hardware.require_device_names(names)


def test_a_gpu_that_is_not_there(torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(LoftqError) as caught:
        hardware.resolve_device("cuda:2")
    assert caught.value.what == "cannot use --device cuda:2"
    assert caught.value.cause == "torch sees 2 CUDA devices with CUDA_VISIBLE_DEVICES=0,1"
    assert caught.value.hint == "use --device cuda:1"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "mps", "", "cudax"])
def test_what_is_no_device(torch: ModuleType, name: str) -> None:
    with pytest.raises(UsageError, match="there is no device"):
        hardware.resolve_device(name)


@pytest.mark.parametrize(
    ("cuda", "visible", "reason"),
    [
        (None, None, "this torch (2.99) is built without CUDA"),
        ("12.8", "", "CUDA_VISIBLE_DEVICES hides every GPU"),
        ("12.8", "-1", "CUDA_VISIBLE_DEVICES hides every GPU"),
        ("12.8", None, "torch finds no CUDA device"),
    ],
)
def test_no_gpu_and_why(
    torch: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    cuda: str | None,
    visible: str | None,
    reason: str,
) -> None:
    torch.cuda.devices = 0
    torch.version.cuda = cuda
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.resolve_device("auto") == ("cpu", f"auto: {reason}")
    with pytest.raises(LoftqError) as caught:
        hardware.resolve_device("cuda")
    assert (caught.value.cause, caught.value.hint) == (reason, "use --device cpu")


@pytest.mark.parametrize(
    ("requested", "device", "stored", "bf16", "value"),
    [
        ("float16", "cpu", "float32", True, "float16"),
        ("auto", "cpu", "bfloat16", True, "bfloat16"),
        ("auto", "cpu", "float16", True, "float32"),
        ("auto", "cpu", None, True, "float32"),
        ("auto", "cuda:0", "float32", True, "float32"),
        ("auto", "cuda:0", "bfloat16", True, "bfloat16"),
        ("auto", "cuda:0", None, True, "bfloat16"),
        ("auto", "cuda:0", "bfloat16", False, "float16"),
        ("auto", "cuda:0", "float32", False, "float32"),
        ("auto", "cuda:0", None, False, "float16"),
    ],
)
def test_dtypes(
    torch: ModuleType, requested: str, device: str, stored: str | None, bf16: bool, value: str
) -> None:
    torch.cuda.bf16 = bf16
    choice = hardware.resolve_dtype(requested, device, stored)
    assert choice.value == value
    assert choice.reason.startswith("asked for" if requested != "auto" else "auto: ")


def test_the_real_torch_gives_a_device_and_a_reason() -> None:
    import torch

    value, reason = hardware.resolve_device("auto")
    assert torch.empty(1, device=value).device.type == value.partition(":")[0]
    assert reason.startswith("auto: ")


def test_environment(torch: ModuleType) -> None:
    facts = Environment.model_validate(hardware.environment())
    assert facts.cpu_count >= 1
    assert facts.memory_bytes is not None
    assert facts.memory_bytes > 2**28
    assert {"torch", "transformers", "peft", "bitsandbytes", "accelerate"} <= set(facts.packages)
    assert [each.name for each in facts.accelerators] == ["Fake GPU 0", "Fake GPU 1"]


def test_peak_memory_grows_and_stays() -> None:
    before = hardware.peak_memory_bytes()
    block = bytearray(before + 64 * 2**20)
    block[::4096] = bytes(len(block[::4096]))
    grown = hardware.peak_memory_bytes()
    assert grown > before + 32 * 2**20
    del block
    assert hardware.peak_memory_bytes() >= grown - 2**20
