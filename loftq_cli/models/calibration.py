"""What the inputs of linear layers look like on a text: their second moments, by running the model.

    G = E[x·xᵀ]    (in × in), over all tokens that reach the layer

The model runs one layer block after the other (see `models.layerwise`), so that the moments of one
are in memory and not those of all: 0.7 GB for a block of a 7B Llama, 22 GB for all of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.errors import LoftqError, UnsupportedModel
from loftq_cli.models.architecture import Architecture, read_architecture
from loftq_cli.models.dtypes import stored_dtype
from loftq_cli.models.layerwise import StagedModel, watched
from loftq_cli.models.loading import LoadedModel, load_tokenizer, read_weights
from loftq_cli.models.source import read_config
from loftq_cli.models.texts import digest, read_text, text_windows

if TYPE_CHECKING:
    from torch import Tensor

# Taken evenly from the text. Five times as many took 5 % off the KL of a small model.
MOST_TOKENS = 65_536
# As many keep a processor busy, and a layer block's activations in hundreds of megabytes.
_BATCH_TOKENS = 4096
# G is symmetric: of its rows, so many at once, only what lies right of the diagonal is summed up.
_PANEL = 1024
# Of the memory that may be used, what weights may take; the rest is for moments and activations.
_FOR_WEIGHTS = 0.5

_NO_CALIBRATION = "use a start that needs no calibration text"


class Calibration:
    """Second moments of the inputs of some modules, in the order in which a model computes them.

    Attributes:
        order: the modules, stage after stage as they run. Asked for in this order, every stage
            runs once.
        text_sha256: what the text is known by.
        windows: windows of the text that are run, and their ``window_length`` in tokens.
        unseen: modules, of stages that have run, which no token reached (experts that were
            never chosen): their moments are zero.
    """

    def __init__(
        self,
        model: Any,
        windows: Tensor,
        modules: Sequence[str],
        device: str,
        text_sha256: str = "",
    ) -> None:
        self.text_sha256 = text_sha256
        self.windows = int(windows.shape[0])
        self.window_length = int(windows.shape[1])
        batches = windows.split(max(1, _BATCH_TOKENS // self.window_length))
        self._model = model
        self._device = device
        self._staged = StagedModel(model, batches, list(dict.fromkeys(modules)), device)
        self._sums: dict[str, _Sum] = {}
        self.order = [module for stage in self._staged.stages for module in stage]
        self.unseen: set[str] = set()

    @property
    def tokens(self) -> int:
        """Tokens that the model is run on. With fewer than its inputs, a layer's G is singular."""
        return self.windows * self.window_length

    def moments(self, module: str) -> Tensor:
        """E[x·xᵀ] of the inputs of ``module``: float32 (in × in), on the device, to be read only.

        Modules that are given the same tensor (q, k and v) get the same object. The model runs up
        to the module's stage, from its beginning if it is past that already; the moments of other
        stages are freed.

        Raises:
            LoftqError: the module's inputs are NaN or infinite, or overflow when squared.
            UnsupportedModel: what a module is given changed in the course of the text.
        """
        stage = self._staged.stage_of[module]
        if stage < self._staged.done - 1:
            self._staged.restart()
        while self._staged.done <= stage:
            self._sums = {}
            self._run(self._staged.stages[stage] if self._staged.done == stage else [])
        found = self._sums[self._staged.groups[module]]
        if found.broken:
            dtype = str(self._model.dtype).removeprefix("torch.")
            raise LoftqError(
                f"the inputs of {module} are NaN, infinite or too large to be squared on the "
                f"calibration text: {int(found.broken)} of {found.tokens} tokens",
                cause=f"a weight before it is broken, or activations overflow {dtype}",
                hint=f"look at the model's own output on this text, or {_NO_CALIBRATION}",
            )
        return found.mean

    def _run(self, modules: list[str]) -> None:
        groups = {module: self._staged.groups[module] for module in modules}
        sums = {name: _Sum(self._width(name), self._device) for name in set(groups.values())}
        shared = {leader for module, leader in groups.items() if module != leader}
        given: dict[str, list[tuple[Tensor, int]]] = {}

        def see(module: str, x: Tensor) -> None:
            leader = groups[module]
            if module == leader:
                sums[leader].add(x)
            if leader in shared:
                given.setdefault(module, []).append((x, x._version))

        with watched(self._model, modules, see):
            for _ in self._staged.run():
                for module, leader in groups.items():
                    if leader in shared and not _identical(given, module, leader):
                        raise UnsupportedModel(
                            f"{module} and {leader} are given the same inputs at times only",
                            cause="their moments were taken for one and the same",
                            hint=_NO_CALIBRATION,
                        )
                given.clear()
        for each in sums.values():
            each.finish()
        self.unseen.update(module for module in modules if not sums[groups[module]].tokens)
        self._sums = sums

    def _width(self, module: str) -> int:
        found = self._model.get_submodule(module)
        # Conv1D of GPT-2 has its weight transposed.
        return int(getattr(found, "in_features", None) or found.weight.shape[0])


class _Sum:
    """Σ x·xᵀ, and how many x there were."""

    def __init__(self, width: int, device: str) -> None:
        import torch

        self.mean = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.tokens = 0
        # How many x were NaN, infinite, or too large for squares in float32.
        self.broken = torch.zeros((), dtype=torch.long, device=device)

    def add(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).to(self.mean.device, self.mean.dtype)
        self.tokens += len(rows)
        self.broken += rows.norm(dim=1).isfinite().logical_not().sum()
        for panel in self._panels():
            part = self.mean[panel, panel.start :]
            part.addmm_(rows[:, panel].T, rows[:, panel.start :])

    def finish(self) -> None:
        """Makes the sum a mean, exactly symmetric."""
        for panel in self._panels():
            square = self.mean[panel, panel]
            square.copy_(square.triu() + square.triu(1).T)
            self.mean[panel.stop :, panel] = self.mean[panel, panel.stop :].T
        self.mean /= max(self.tokens, 1)

    def _panels(self) -> Iterator[slice]:
        for start in range(0, len(self.mean), _PANEL):
            yield slice(start, min(start + _PANEL, len(self.mean)))


def _identical(given: dict[str, list[tuple[Tensor, int]]], module: str, leader: str) -> bool:
    one, other = given.get(module, []), given.get(leader, [])
    return len(one) == len(other) and all(
        x is y and version == now for (x, version), (y, now) in zip(one, other, strict=True)
    )


@contextmanager
def open_calibration(
    directory: Path,
    text: Path,
    modules: Sequence[str],
    *,
    device: str,
    trust_remote_code: bool = False,
    max_memory_bytes: int | None = None,
    most_tokens: int = MOST_TOKENS,
) -> Iterator[Calibration]:
    """The model in ``directory``, ready to say what ``modules`` are given on ``text``.

    The same files give the same moments, bit for bit, on the same machine. Weights that are not
    within half of ``max_memory_bytes`` (None: no limit) stay in their files and are read when their
    turn comes. float16 is computed in float32 on a CPU; every other dtype is as it is stored.

    Raises:
        UnsupportedModel: the model does not read text, or has no tokenizer.
        CorruptCheckpoint: files contradict each other, the tokenizer's and the model's included.
        LoftqError: the text cannot be read.
        InvalidSetting: the text is empty, not a text, or shorter than one window.
    """
    config = read_config(directory)
    open_checkpoint(directory)  # its errors name the file; the libraries' often do not
    architecture = read_architecture(directory, config, trust_remote_code=trust_remote_code)
    content = read_text(text)
    windows = _windows(directory, architecture, content, str(text), trust_remote_code, most_tokens)
    dtype = stored_dtype(config) or "float32"
    if dtype == "float16" and device == "cpu":
        dtype = "float32"  # half-precision kernels on the CPU are missing for some operations
    with tempfile.TemporaryDirectory(prefix="loftq-") as scratch:
        model = read_weights(
            directory,
            architecture,
            dtype,
            # Weights that change their form when they are loaded (experts) are written there.
            offload_folder=scratch,
            offload_buffers=True,
            **_placement(device, max_memory_bytes),
        )
        for module in model.modules():
            # Nothing is generated: keys and values of earlier tokens need not be kept.
            if hasattr(module, "config") and getattr(module.config, "use_cache", None):
                module.config.use_cache = False
        yield Calibration(model.eval(), windows, modules, device, digest(content))


def _windows(
    directory: Path,
    architecture: Architecture,
    text: str,
    name: str,
    trust_remote_code: bool,
    most: int,
) -> Tensor:
    model = architecture.model
    if model.main_input_name != "input_ids":
        raise UnsupportedModel(
            f"{architecture.class_name} does not read text",
            cause=f"its input is {model.main_input_name}",
            hint=_NO_CALIBRATION,
        )
    tokenizer = load_tokenizer(directory, trust_remote_code)
    if tokenizer is None:
        raise UnsupportedModel(
            f"{directory} has no tokenizer, which a calibration text needs",
            cause="there is no tokenizer.json",
            hint=f"put the model's tokenizer files there, or {_NO_CALIBRATION}",
        )
    loaded = LoadedModel(model, tokenizer, None)
    windows = text_windows(loaded, text, name, most)
    return windows[:, : _positions(model)]


def _positions(model: Any) -> int | None:
    """How many positions models like RoBERTa can give: they count from behind the padding's."""
    tables = (
        module for name, module in model.named_modules() if name.endswith("position_embeddings")
    )
    usable = [
        table.num_embeddings - table.padding_idx - 1
        for table in tables
        if getattr(table, "padding_idx", None) is not None
    ]
    return min(usable, default=None)


def _placement(device: str, max_memory_bytes: int | None) -> dict[str, Any]:
    """Where the weights are: on the device, in memory or in their files.

    Wherever that is, it is on ``device`` that transformers and accelerate compute with them.
    """
    if device == "cpu" and max_memory_bytes is None:
        return {"device_map": {"": "cpu"}}
    limits: dict[int | str, int] = {}
    if device != "cpu":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        limits[torch.device(device).index or 0] = int(free * _FOR_WEIGHTS)
    in_memory = max_memory_bytes if max_memory_bytes is not None else 1 << 60
    limits["cpu"] = int(in_memory * _FOR_WEIGHTS)
    return {"device_map": "auto", "max_memory": limits}
