"""The main job on this device: quantize into a directory, load that, and measure it again."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from loftq_cli.checks.battery import Finding
from loftq_cli.checks.model import Subject
from loftq_cli.checks.written.residuals import TOLERANCE, loaded_residual
from loftq_cli.engines.job import Job, make_directory
from loftq_cli.engines.settings import Settings
from loftq_cli.errors import CheckFailed, UnsupportedModel
from loftq_cli.models.generation import continue_text
from loftq_cli.models.loading import load_model, require_text_model
from loftq_cli.record import Listener, Record
from loftq_cli.schema import AdaptedLayer

SETTINGS = Settings(rank=8, lora_alpha=16, iterations=2)


@dataclass
class RoundTrip:
    """The directory that `quantize` writes and `reload` reads; gone when ``files`` is closed."""

    subject: Subject
    files: ExitStack
    output: Path | None = field(default=None, init=False)
    layers: list[AdaptedLayer] = field(default_factory=list, init=False)

    def quantize(self) -> Finding:
        """Every layer to NF4 with a LoftQ adapter, into a temporary directory."""
        subject = self.subject
        subject.loaded = None  # its memory is needed
        temporary = tempfile.TemporaryDirectory(prefix="loftq-check-")
        self.output = Path(self.files.enter_context(temporary)) / "model"
        job = Job(
            str(subject.directory),
            self.output,
            SETTINGS,
            device=subject.device,
            trust_remote_code=subject.trust_remote_code,
        )
        # The battery's own bar is the only one.
        made = make_directory(job, Record("quantize", ["loftq", "quantize"], Listener()))
        if made.on_cpu:  # a finding here, not a detail
            raise CheckFailed(
                f"{made.on_cpu[0]} does not fit on {made.device}: computed on the CPU",
                hint="choose --device cpu, or free memory on the device",
            )
        results = made.document.results
        self.layers = layers = results.layers
        before, after = (
            sum(getattr(each, key) for each in layers) / len(layers)
            for key in ("quantized_only_error_relative", "weight_error_relative")
        )
        worse = [
            each.name
            for each in layers
            if (each.weight_error_relative or 0) > (each.quantized_only_error_relative or 0)
        ]
        if worse:
            raise CheckFailed(
                f"LoftQ leaves {len(worse)} layers worse than plain quantization",
                cause=f"the first is {worse[0]}; the SVD of this device does not do its part",
            )
        return Finding(
            f"{len(layers)} layers; mean error {100 * before:.3g} % quantized, "
            f"{100 * after:.3g} % with the adapter",
            {
                "layers": len(layers),
                "quantized_only_error_relative": before,
                "weight_error_relative": after,
                "input_bytes": subject.checkpoint.total_bytes,
                "output_bytes": results.totals.output_bytes,
                "rank": SETTINGS.rank,
                "iterations": SETTINGS.iterations,
            },
        )

    def reload(self) -> Finding:
        """The written directory through transformers, bitsandbytes and PEFT."""
        subject = self.subject
        assert self.output is not None
        loaded = load_model(
            self.output,
            device=subject.device,
            dtype=subject.dtype,
            trust_remote_code=subject.trust_remote_code,
        )
        inventory = subject.on_meta().inventory(subject.checkpoint.infos)
        originals = {each.module: each for each in inventory.layers}
        largest = 0.0
        for layer in self.layers:
            original = originals[layer.name]
            found, plain = loaded_residual(
                loaded.model, SETTINGS.container, subject.checkpoint, original
            )
            reported = layer.weight_error_relative or 0.0
            gap = abs(found - reported)
            largest = max(largest, gap)
            if not gap <= TOLERANCE:
                raise CheckFailed(
                    f"{layer.name} is not what quantize measured",
                    cause=f"its residual is {found:.6f} by the files, and {reported:.6f} "
                    f"was reported; without the adapter it is {plain:.6f}",
                    hint="pip install -U bitsandbytes peft transformers",
                )
        wrote = ""
        try:
            require_text_model(loaded)
        except UnsupportedModel:
            pass
        else:
            continue_text(loaded, "def", 4)
            wrote = "; it writes text"
        return Finding(
            f"residuals of {len(self.layers)} layers from the files equal the report's to "
            f"{largest:.0e}{wrote}",
            {"layers": len(self.layers), "largest_difference": largest},
        )
