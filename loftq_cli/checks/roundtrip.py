"""The main job on this device: quantize into a directory, load that, and measure it again."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from loftq_cli.checkpoint.staging import Staging
from loftq_cli.checkpoint.writer import require_free_space
from loftq_cli.checks.battery import Finding
from loftq_cli.checks.model import Subject
from loftq_cli.engines import output as output_files
from loftq_cli.engines.local import run_tasks
from loftq_cli.engines.pipeline import Timings
from loftq_cli.engines.plan import Plan, make_plan
from loftq_cli.engines.remeasure import residuals
from loftq_cli.engines.settings import Settings
from loftq_cli.engines.tasks import LayerOutcome, Progress
from loftq_cli.errors import CheckFailed, UnsupportedModel
from loftq_cli.models.generation import continue_text
from loftq_cli.models.loading import load_model, require_text_model
from loftq_cli.models.source import companions

SETTINGS = Settings(rank=8, lora_alpha=16, iterations=2)
_TOLERANCE = 1e-5


class _Silent:
    """The battery's own bar is the only one."""

    def start(self, name: str) -> None: ...
    def advance(self, name: str) -> None: ...


def _refuse_fallback(text: str) -> None:
    """A layer that this device has no room for is a finding, not a detail."""
    raise CheckFailed(text, hint="choose --device cpu, or free memory on the device")


@dataclass
class RoundTrip:
    """The directory that `quantize` writes and `reload` reads; gone when ``files`` is closed."""

    subject: Subject
    files: ExitStack
    output: Path | None = field(default=None, init=False)
    plan: Plan | None = field(default=None, init=False)
    outcomes: list[LayerOutcome] = field(default_factory=list, init=False)

    def quantize(self) -> Finding:
        """Every layer to NF4 with a LoftQ adapter, into a temporary directory."""
        subject = self.subject
        subject.loaded = None  # its memory is needed
        temporary = tempfile.TemporaryDirectory(prefix="loftq-check-")
        self.output = Path(self.files.enter_context(temporary)) / "model"
        architecture = subject.on_meta()
        checkpoint = subject.checkpoint
        tensors = [info for _, info in checkpoint.tensors.values()]
        plan = make_plan(architecture.inventory(tensors), SETTINGS)
        require_free_space(self.output, int(1.02 * (plan.model_bytes + 2 * plan.adapter_bytes)))
        silent: Progress = _Silent()
        with Staging(self.output, fingerprint={}, force=False) as staging:
            outcomes = run_tasks(
                plan,
                checkpoint,
                staging,
                device=subject.device,
                progress=silent,
                timings=Timings(),
                warn=_refuse_fallback,
            )
            output_files.join_adapter(plan, checkpoint, staging, architecture, base_model="model")
            output_files.write_model_files(
                plan,
                staging,
                architecture,
                subject.config,
                companions(subject.directory, with_code=subject.trust_remote_code),
            )
            staging.commit()
        self.plan, self.outcomes = plan, outcomes
        before, after = (
            sum(getattr(each, key) for each in outcomes) / len(outcomes)
            for key in ("quantized_only_error", "error")
        )
        worse = [each.name for each in outcomes if each.error > each.quantized_only_error]
        if worse:
            raise CheckFailed(
                f"LoftQ leaves {len(worse)} layers worse than plain quantization",
                cause=f"the first is {worse[0]}; the SVD of this device does not do its part",
            )
        return Finding(
            f"{len(outcomes)} layers; mean error {100 * before:.3g} % quantized, "
            f"{100 * after:.3g} % with the adapter",
            {
                "layers": len(outcomes),
                "quantized_only_error_relative": before,
                "weight_error_relative": after,
                "input_bytes": checkpoint.total_bytes,
                "output_bytes": plan.model_bytes,
                "rank": SETTINGS.rank,
                "iterations": SETTINGS.iterations,
            },
        )

    def reload(self) -> Finding:
        """The written directory through transformers, bitsandbytes and PEFT."""
        subject = self.subject
        assert self.output is not None
        assert self.plan is not None
        loaded = load_model(
            self.output,
            device=subject.device,
            dtype=subject.dtype,
            trust_remote_code=subject.trust_remote_code,
        )
        reported = {each.name: each for each in self.outcomes}
        largest = 0.0
        for found in residuals(loaded.model, subject.checkpoint, self.plan.layers):
            told = reported[found.name]
            gap = abs(found.error - told.error)
            largest = max(largest, gap)
            if not gap <= _TOLERANCE:
                raise CheckFailed(
                    f"{found.name} is not what quantize measured",
                    cause=f"its residual is {found.error:.6f} by the files, and {told.error:.6f} "
                    f"was reported; without the adapter it is {found.error_without_adapter:.6f}",
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
            f"residuals of {len(reported)} layers from the files equal the report's to "
            f"{largest:.0e}{wrote}",
            {"layers": len(reported), "largest_difference": largest},
        )
