"""What a calibrated start knows of its layers' inputs, and those of what it has made of layers.

In sequence, the inputs of a layer are those that the quantized layers before it leave. These come
from here: of the file that is being made as they were made, and of finished files, an earlier run's
too, from there. Either gives the same bits, so a run that goes on ends in the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.adapter import ADAPTER_NAME, adapter_part, lora_names
from loftq_cli.checkpoint.safetensors import read_header
from loftq_cli.checkpoint.tensors import load_tensor
from loftq_cli.engines.plan import GatheredInputs, Plan, PlannedLayer
from loftq_cli.engines.settings import CalibrationText, Settings
from loftq_cli.errors import LoftqError
from loftq_cli.record import Record
from loftq_cli.report import units

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.core.input_moments import Drift
    from loftq_cli.models.calibration import Calibration
    from loftq_cli.models.quantized_layers import QuantizedLayer

# The tensors in files of gathered inputs.
MOMENTS, DRIFT, STREAM = "moments", "drift", "stream"


class FinishedLayers:
    """Layers as the runtime will have them, each to be asked for once it is quantized."""

    def __init__(self, settings: Settings, directory: Path, device: str) -> None:
        """Files lie in ``directory``; what comes from finished ones is read to ``device``."""
        self._settings = settings
        self._directory = directory
        self._device = device
        self._of: dict[str, tuple[str, PlannedLayer]] = {}
        self._kept: dict[str, tuple[Any, tuple[Tensor, Tensor] | None]] = {}

    def lies_in(self, planned: PlannedLayer, file_name: str) -> None:
        """Which file a layer is in, or will be; the last that is said counts."""
        self._of[planned.layer.module] = file_name, planned

    def keep(self, module: str, quantized: Any, adapter: tuple[Tensor, Tensor] | None) -> None:
        """A layer of the file that is being made: its codes, and A and B as they will lie there."""
        self._kept[module] = quantized, adapter

    def __call__(self, module: str) -> QuantizedLayer:
        """What has become of a layer. One that was kept is forgotten then."""
        from loftq_cli.models.quantized_layers import QuantizedLayer

        file_name, planned = self._of[module]
        if module in self._kept:
            quantized, adapter = self._kept.pop(module)
        else:
            quantized, adapter = self._read(file_name, planned)
        Q = self._settings.quantizer(planned.bits).dequantize(quantized)
        return QuantizedLayer(Q, adapter, self._settings.scaling)

    def _read(
        self, file_name: str, planned: PlannedLayer
    ) -> tuple[Any, tuple[Tensor, Tensor] | None]:
        header, container = read_header(self._directory / file_name), self._settings.container
        tensors = {name: (header, info) for name, info in header.tensors.items()}
        quantized = container.quantized(container.read(tensors, planned.weight, self._device))
        if not planned.adapted:
            return quantized, None
        part = self._directory / adapter_part(file_name)
        header = read_header(part if part.exists() else self._directory / ADAPTER_NAME)
        A, B = (
            load_tensor(header, header.tensors[name]) for name in lora_names(planned.layer.module)
        )
        return quantized, (A, B)


class LayerInputs:
    """What is asked for each layer of a calibrated start, in the order of the plan."""

    def of(self, module: str) -> tuple[Tensor | None, Drift | None]:
        """The second moments of its inputs (in × in), and how far these are from the original's.

        None of an expert whose inputs cannot be seen.
        """
        raise NotImplementedError

    def keep(self, module: str, quantized: Any, adapter: tuple[Tensor, Tensor] | None) -> None:
        """Told of each layer when it is quantized; as `FinishedLayers.keep`."""


class CalibratedInputs(LayerInputs):
    """Those of a model that runs in this process."""

    def __init__(self, calibration: Calibration, finished: FinishedLayers | None = None) -> None:
        """With ``finished`` layers the calibration follows those."""
        self._calibration = calibration
        self._finished = finished

    def of(self, module: str) -> tuple[Tensor | None, Drift | None]:
        if not self._calibration.knows(module):
            return None, None
        return self._calibration.moments(module), self._calibration.drift(module)

    def keep(self, module: str, quantized: Any, adapter: tuple[Tensor, Tensor] | None) -> None:
        # Of others nobody will ask.
        if self._finished is not None and self._calibration.knows(module):
            self._finished.keep(module, quantized, adapter)

    def turn(self, planned: PlannedLayer) -> tuple[Any, ...]:
        """The same for layers that come after each other and do not wait for each other."""
        module = planned.layer.module
        return self._calibration.turn_of(module) if self._calibration.knows(module) else ()

    def lies_in(self, planned: PlannedLayer, file_name: str) -> None:
        """Told of each layer that another process has quantized, and where it put it."""
        if self._finished is not None:
            self._finished.lies_in(planned, file_name)


class StoredInputs(LayerInputs):
    """Those of one layer, that another process has seen."""

    def __init__(self, directory: Path, gathered: GatheredInputs) -> None:
        self._directory = directory
        self._gathered = gathered

    def of(self, module: str) -> tuple[Tensor | None, Drift | None]:
        from loftq_cli.core.input_moments import Drift

        tensors: dict[str, Tensor] = {}
        for file_name in self._gathered.file_names:
            header = read_header(self._directory / file_name)
            tensors |= {name: load_tensor(header, info) for name, info in header.tensors.items()}
        drift = None
        if DRIFT in tensors:
            drift = Drift(tensors[DRIFT], self._gathered.drift_energy, tensors.get(STREAM))
        return tensors[MOMENTS], drift


@contextmanager
def opened_calibration(
    plan: Plan,
    directory: Path,
    text: Path,
    *,
    device: str,
    trust_remote_code: bool,
    max_memory_bytes: int | None,
    record: Record,
) -> Iterator[Calibration]:
    """The inputs of the plan's layers, of the model in ``directory``, on the calibration text."""
    from loftq_cli.models.calibration import open_calibration

    asked = plan.settings.calibration
    assert asked is not None
    layers = [planned.layer for planned in plan.layers]
    experts = [layer.module for layer in layers if layer.expert]
    with open_calibration(
        directory,
        text,
        [layer.module for layer in layers if not layer.expert],
        device=device,
        experts=experts,
        trust_remote_code=trust_remote_code,
        max_memory_bytes=max_memory_bytes,
        most_tokens=asked.tokens,
    ) as calibration:
        require_same_text(text, calibration.text_sha256, asked)
        if unknown := sum(not calibration.knows(module) for module in experts):
            record.warn(
                f"no moments of the inputs of {unknown} matrices of experts, of a class that does "
                "not show them: there the errors of weights are what counts"
            )
        widest = max(layer.in_features for layer in layers)
        if calibration.tokens < widest:
            record.warn(
                f"the calibration text has {calibration.tokens} tokens, fewer than the "
                f"{widest} inputs of the widest layer: more text would tell more"
            )
        yield calibration
        if calibration.unseen:
            record.warn(
                f"no token of the calibration text, or only a few, reached "
                f"{units.plural(len(calibration.unseen), 'layer')}, {min(calibration.unseen)} "
                "among them: there the errors of weights were what counted"
            )


def require_same_text(text: Path, sha256: str, asked: CalibrationText) -> None:
    """Refuses a text of this hash that is not the one that was ``asked`` for.

    Raises:
        LoftqError
    """
    if sha256 != asked.sha256:
        raise LoftqError(
            f"{text} has changed since the run began", hint="run it again when it is complete"
        )


def layer_inputs(
    calibration: Calibration, plan: Plan, directory: Path, device: str, record: Record
) -> tuple[Plan, CalibratedInputs]:
    """The plan in the order in which the inputs of its layers are known, and these inputs."""
    finished = None
    if plan.settings.calibration_order == "sequential":
        finished = FinishedLayers(plan.settings, directory, device)
        if not calibration.follow(finished):
            finished = None
            record.warn(
                "this model runs in one piece only: all layers are calibrated on what the original "
                "gives them, as with --calibration-order parallel"
            )
    if calibration.on_disk:
        size = units.size(calibration.on_disk)
        record.note(f"{size} of hidden states lie on the disk between two blocks")
    plan = plan.in_order(calibration.order)
    if finished is not None:
        for task in plan.tasks:
            for planned in task.layers:
                finished.lies_in(planned, task.file_name)
    return plan, CalibratedInputs(calibration, finished)
