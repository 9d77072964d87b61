"""What every layer leaves of its original weight, measured again from the files.

Q is what bitsandbytes dequantizes, A and B are read from the adapter, W from the source; sums and
products are float64. One layer is held at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.adapter import ADAPTER_DIRECTORY, lora_names
from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.checkpoint.tensors import load_tensor
from loftq_cli.checks.battery import Finding, NothingToCheck
from loftq_cli.checks.written.claims import ClaimedLayer
from loftq_cli.checks.written.directory import WRITE_AGAIN, Written
from loftq_cli.containers.base import Container
from loftq_cli.engines.placement import read_weight
from loftq_cli.errors import CheckFailed
from loftq_cli.models.layers import LinearLayer
from loftq_cli.models.spec import ResolvedModel
from loftq_cli.models.trained_adapter import TrainedAdapter, read_trained, with_experts

if TYPE_CHECKING:
    from torch import Tensor

# The report's figures were summed from float32 differences, perhaps on another device.
TOLERANCE = 1e-5
# So many layers, spread over the model, come first. If none of them agrees, it is the source that
# is another, and there is no need to measure a thousand more.
_PROBES = 5
_OUTPUTS = "; errors of outputs were not measured again, which takes the calibration text"


@dataclass(frozen=True)
class LayerResidual:
    """One layer's ‖W − Q − s·B·A‖ / ‖W‖: ``error`` by the files, ``reported`` by the report.

    ``backbone`` is the same without the adapter, ``norm`` is ‖W‖. ``copied`` is false where a
    weight should be the source's, byte by byte, and is not. Of an expert all are of its codes
    alone; with its part of an adapter on all of them it leaves ``with_others``.
    """

    name: str
    shape: tuple[int, int]
    error: float
    backbone: float
    norm: float
    reported: float | None
    reported_backbone: float | None = None
    copied: bool = True
    with_others: float | None = None

    @property
    def agrees(self) -> bool:
        return (
            self.copied
            and self.reported is not None
            and abs(self.error - self.reported) <= TOLERANCE
            and self.backbone_agrees
        )

    @property
    def backbone_agrees(self) -> bool:
        """Reports of earlier versions say nothing of the backbone alone."""
        reported = self.reported_backbone
        return reported is None or abs(self.backbone - reported) <= TOLERANCE


@dataclass
class Residuals:
    """The check; ``measured`` has the layers that it came to, whatever the outcome.

    ``source`` is None where the weights are not at hand.
    """

    written: Written
    source: ResolvedModel | None
    layers: Sequence[ClaimedLayer]
    measured: list[LayerResidual] = field(default_factory=list, init=False)

    def check(self) -> Finding:
        if self.source is None:
            raise NothingToCheck(
                f"the source, {self.written.claims.source}, is not on this disk, and nothing is "
                "downloaded for this; name a directory or a cached model with --source MODEL"
            )
        checkpoint = self.source.checkpoint().cast(self.written.claims.settings.dtype)
        same_files = has_reported_files(self.written, checkpoint)
        originals = self.written.originals(checkpoint)
        for layer in self.layers:
            self._require_in_source(layer, originals.get(layer.name))
        probes = spread(self.layers, _PROBES)
        rest = [layer for layer in self.layers if layer not in probes]
        for layers in (probes, rest):
            for layer in layers:
                self.written.progress.start(layer.name)
                found = self._measure(layer, originals[layer.name], checkpoint)
                self.measured.append(found)
                self.written.progress.advance(layer.name)
            self._require_some_agreement(same_files)
        order = {layer.name: place for place, layer in enumerate(self.layers)}
        self.measured.sort(key=lambda each: order[each.name])
        self._require_agreement()
        self._require_total()
        self._require_total_of_experts()
        return self._finding(same_files)

    def _require_in_source(self, layer: ClaimedLayer, original: LinearLayer | None) -> None:
        if original is None:
            raise self._another_source(f"it has no weight for {layer.name}")
        shape = (original.out_features, original.in_features)
        if shape != layer.shape:
            raise self._another_source(
                f"its {layer.name} is {shape[0]}×{shape[1]}, and "
                f"{layer.shape[0]}×{layer.shape[1]} was quantized"
            )

    def _measure(
        self, layer: ClaimedLayer, original: LinearLayer, checkpoint: Checkpoint
    ) -> LayerResidual:
        from loftq_cli.core.residual import left_by

        device = self.written.device
        W = read_weight(checkpoint, original, device)
        copied = True
        container = self.written.claims.container
        if container.quantizes:
            Q = container.runtime(self.written.stored(layer))
        else:
            found = self.written.plain_layers[layer.name]
            Q = read_weight(self.written.checkpoint, found, device)
            copied = Q.dtype == W.dtype and _same_bytes(W, Q)
        correction, of_expert = None, False
        adapter, on_experts = self.written.adapter_header, self._on_experts
        if adapter is not None and layer.stored_rank:
            A, B = (
                load_tensor(adapter, adapter.tensors[name]).to(W.device).double()
                for name in lora_names(layer.name)
            )
            correction = (B * self.written.claims.scaling, A)
        elif on_experts is not None and layer.name in on_experts.pairs:
            A, B, scaling = on_experts.factors(layer.name)
            correction, of_expert = (
                (B.to(W.device).double() * scaling, A.to(W.device).double()),
                True,
            )
        error, backbone, norm = left_by(W, Q, correction)
        return LayerResidual(
            layer.name,
            layer.shape,
            backbone if of_expert else error,
            backbone,
            norm,
            layer.error,
            layer.backbone,
            copied,
            error if of_expert else None,
        )

    @cached_property
    def _on_experts(self) -> TrainedAdapter | None:
        """The adapter, told apart by experts, where it corrects those."""
        reported = self.written.claims.results.expert_adapters
        if reported is None or reported.weight_error_relative is None:
            return None
        adapter = read_trained(self.written.directory / ADAPTER_DIRECTORY)
        return with_experts(adapter, self.written.architecture, self.written.weights.values())

    def _require_total_of_experts(self) -> None:
        """What all experts with adapters leave, where all were measured."""
        reported, on_experts = self.written.claims.results.expert_adapters, self._on_experts
        measured = [each for each in self.measured if each.with_others is not None]
        if reported is None or on_experts is None or len(measured) < len(on_experts.experts):
            return
        whole = math.hypot(*(each.norm for each in measured)) or 1.0
        for what, said, errors in (
            ("with", reported.weight_error_relative, [each.with_others for each in measured]),
            ("without", reported.backbone_error_relative, [each.backbone for each in measured]),
        ):
            lost = (
                (error or 0.0) * each.norm for error, each in zip(errors, measured, strict=True)
            )
            found = math.hypot(*lost) / whole
            if said is None or abs(found - said) > TOLERANCE:
                raise CheckFailed(
                    f"experts do not leave what was reported {what} their adapters",
                    cause=f"they leave {found:.6f}, reported was {said}: the adapter, or the "
                    "report, was changed",
                    hint=WRITE_AGAIN,
                )

    def _require_some_agreement(self, same_files: bool | None) -> None:
        """A fine-tuned twin has the same names and shapes, and agrees nowhere."""
        if any(each.agrees for each in self.measured):
            return
        first = _told(self.measured[0])
        if same_files is False:
            raise self._another_source(
                f"its weight files are not those that the report names, and {first}"
            )
        if len(self.measured) > 1:
            raise self._another_source(
                f"not one of {len(self.measured)} layers all over the model leaves with it what "
                f"was reported: {first}; unless all of the directory was changed, it has other "
                "weights"
            )

    def _require_agreement(self) -> None:
        wrong = [each for each in self.measured if not each.agrees]
        if not wrong:
            return
        if not wrong[0].copied:
            raise CheckFailed(
                f"{wrong[0].name} is not the source's weight",
                cause="nothing is quantized here, and yet its bytes are others than those of "
                f"{self.source.identity.id if self.source else 'the source'}",
                hint=WRITE_AGAIN,
            )
        more = f"; {len(wrong)} of {len(self.measured)} layers differ" if len(wrong) > 1 else ""
        raise CheckFailed(
            f"{wrong[0].name} does not leave the residual that was reported",
            cause=f"{_told(wrong[0])}{more}: its codes, scales or adapter, or the report, were "
            "changed",
            hint=WRITE_AGAIN,
        )

    def _require_total(self) -> None:
        """All layers as one long vector, where all were measured."""
        claims = self.written.claims
        if len(self.measured) < len(claims.layers):
            return
        norms = {each.name: each.norm for each in self.measured}
        measured: dict[str, float | None] = {each.name: each.error for each in self.measured}
        alone: dict[str, float | None] = {each.name: each.backbone for each in self.measured}
        # Not measured here, since its codes are in no file; but it has to fit that of the layers.
        plain = {each.name: each.quantized_only_error_relative for each in claims.listed}
        for what, reported, errors in (
            ("weight error", claims.results.totals.weight_error_relative, measured),
            ("error of the backbone", claims.results.totals.backbone_error_relative, alone),
            (
                "weight error without adapters",
                claims.results.totals.quantized_only_error_relative,
                plain,
            ),
        ):
            parts = [error * norms[name] for name, error in errors.items() if error is not None]
            total = math.hypot(*parts) / (math.hypot(*norms.values()) or 1.0)
            if reported is None or len(parts) < len(errors) or abs(total - reported) <= TOLERANCE:
                continue
            raise CheckFailed(
                f"the layers do not add up to the {what} that was reported for all",
                cause=f"they leave {total:.6f}, reported was {reported:.6f}: the report was "
                "changed",
                hint=WRITE_AGAIN,
            )

    def _finding(self, same_files: bool | None) -> Finding:
        assert self.source is not None
        outputs = self.written.claims.results.totals.output_error_relative
        largest = max(abs(each.error - (each.reported or 0.0)) for each in self.measured)
        count, total = len(self.measured), len(self.written.claims.layers)
        which = f"all {total} layers" if count == total else f"{count} of {total} layers"
        note = {
            True: "",
            False: "; its files are not those that were quantized, but these weights are the same",
            None: "",
        }[same_files]
        return Finding(
            f"{which} measured against {self.source.identity.id}: as reported, "
            f"to {largest:.0e}{note}{'' if outputs is None else _OUTPUTS}",
            {"layers": count, "largest_difference": largest},
        )

    def _another_source(self, cause: str) -> CheckFailed:
        assert self.source is not None
        return CheckFailed(
            f"{self.source.identity.id} is not what was quantized",
            cause=cause,
            hint=f"--source MODEL with what it was made from: {self.written.claims.source}",
        )


def has_reported_files(written: Written, checkpoint: Checkpoint) -> bool | None:
    """Whether these are the weight files that were quantized; None if nobody noted which."""
    files = written.claims.results.source_files
    reported = {(each.name, each.bytes, each.header_sha256) for each in files}
    headers = checkpoint.headers.items()
    found = {(name, header.file_bytes, header.sha256) for name, header in headers}
    return found == reported if reported else None


def spread(layers: Sequence[ClaimedLayer], count: int | None) -> list[ClaimedLayer]:
    """``count`` layers, the same ones each time: one from each of so many stretches of the model.

    Which one of a stretch is left to a hash of its name. Every n-th layer could always be the same
    kind of layer, since blocks repeat.
    """
    if count is None or count >= len(layers):
        return list(layers)
    borders = [len(layers) * part // count for part in range(count + 1)]
    return [
        min(
            layers[first:last],
            key=lambda layer: hashlib.sha256(layer.name.encode("utf-8", "replace")).digest(),
        )
        for first, last in pairwise(borders)
    ]


def loaded_residual(
    model: Any, container: Container | None, checkpoint: Checkpoint, layer: LinearLayer
) -> tuple[float, float]:
    """‖W − Q − s·B·A‖ / ‖W‖ and ‖W − Q‖ / ‖W‖ of a layer of a quantized PEFT model in memory.

    The second is more than plain quantization leaves: this Q was chosen to go with its adapter. To
    be called before the model's first forward pass (see `Container.held`). Without a ``container``
    the layers are plain ones, and have Q for their weight.

    Raises:
        CheckFailed: the layer was not loaded as a quantized one with an adapter.
    """
    import torch

    from loftq_cli.core.residual import left_by

    module = model.get_base_model().get_submodule(layer.module)
    base = getattr(module, "base_layer", module)
    if container is not None and not container.holds(base):
        kind = type(base).__name__
        raise CheckFailed(f"{layer.module} was loaded as {kind}, not as a quantized layer")
    with torch.no_grad():
        Q = base.weight.detach() if container is None else container.held(base)
        W = read_weight(checkpoint, layer, str(Q.device))
        (adapter,) = module.active_adapters
        A, B = module.lora_A[adapter].weight.double(), module.lora_B[adapter].weight.double()
        whole, alone, _ = left_by(W, Q, (B * module.scaling[adapter], A))
    return whole, alone


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    import torch

    return bool(torch.equal(one.cpu().view(torch.uint8), other.cpu().view(torch.uint8)))


def _told(measured: LayerResidual) -> str:
    error, said, what = measured.error, measured.reported, ""
    if said is not None and not measured.backbone_agrees and abs(error - said) <= TOLERANCE:
        error, said, what = measured.backbone, measured.reported_backbone, " without its adapter"
    reported = "nothing" if said is None else f"{said:.6f}"
    return f"{measured.name} leaves {error:.6f}{what}, reported was {reported}"
