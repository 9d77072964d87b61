"""What an `export` run will write: pure data, made from report, headers and config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.adapter import ADAPTER_DIRECTORY
from loftq_cli.checkpoint.index import INDEX_FILE
from loftq_cli.containers import kind_of
from loftq_cli.containers.base import Container, Weight
from loftq_cli.containers.integers import Integers
from loftq_cli.engines.plan import more_skipped
from loftq_cli.engines.report_file import Report, read_report
from loftq_cli.engines.written import (
    ADAPTER_CONFIG_NAME,
    COPY_AGAIN,
    Written,
    open_written,
    reported_container,
)
from loftq_cli.errors import CorruptCheckpoint, InvalidSetting, UnsupportedModel, UsageError
from loftq_cli.formats import DTYPE_NAMES
from loftq_cli.models.layers import STACKED_EXPERTS
from loftq_cli.models.source import CONFIG_FILE, README_FILE, REPORT_FILE, main_dtype
from loftq_cli.models.trained_adapter import missing_modules, read_trained

_MADE_ANEW = {REPORT_FILE, README_FILE, CONFIG_FILE, INDEX_FILE, ADAPTER_CONFIG_NAME}


@dataclass(frozen=True)
class ExportPlan:
    """A directory, and the container that it is written in. ``skipped`` are the modules that are
    not quantized."""

    written: Written
    skipped: Sequence[str]
    after: Container

    @property
    def before(self) -> Container:
        return self.written.container

    @property
    def copied(self) -> list[str]:
        """The files that stay as they are."""
        written = self.written
        return [name for name in written.listed if name not in {*_MADE_ANEW, *written.files}]

    def stored_bits(self, container: Container) -> float:
        """What a quantized weight takes, scales included."""
        weights = self.written.weights
        planned = (each for weight in weights for each in container.planned(weight))
        elements = sum(weight.shape[0] * weight.shape[1] for weight in weights)
        return 8 * sum(each.nbytes for each in planned) / elements

    def exported_report(self, out: Path) -> Report:
        """What is to be said of the output, whose files are still those of the source here.

        It has no fingerprint: no run of `quantize` may take the output for its own.
        """
        report = self.written.report
        results = report.results
        bits = self.stored_bits(self.after)  # and no code tells less than it takes
        totals = {
            "output_bytes": self.written.bytes(self.after.planned),
            "stored_bits": bits,
            "information_bits": bits,
        }
        changed = {
            "output": str(out),
            "repository": None,
            "fingerprint": None,
            "settings": results.settings.model_copy(update={"container": self.after.name}),
            "totals": results.totals.model_copy(update=totals),
        }
        return report.model_copy(update={"results": results.model_copy(update=changed)})


def plan_export(source: Path, container: str, *, trust_remote_code: bool = False) -> ExportPlan:
    """Decides for every tensor and file what becomes of it; no weight is read.

    Raises:
        ModelNotFound: the directory is nothing that loftq wrote.
        UnsupportedModel: it has no integer codes.
        UsageError: it is in this container already, or the container has no integers.
        InvalidSetting: a weight does not fit into the container.
        CorruptCheckpoint: report and files contradict each other.
    """
    report = read_report(source)
    before = reported_container(source, report)
    after = _container(source, report, before, container)
    written, architecture = open_written(
        source, report, before, trust_remote_code=trust_remote_code
    )
    experts = [each for each in written.weights if architecture.expert_shape(each.name)]
    own = [each for each in experts if architecture.stacks.restacked(each.name) is not None]
    if own and not after.restacks:
        raise InvalidSetting(
            f"{own[0].module} does not fit into {container}",
            cause=f"the model has {STACKED_EXPERTS}",
            hint="make the directory from the original, where they stay in 16 bits: loftq quantize "
            f"--container {container}",
        )
    after.require_fit(written.weights)
    _require_unadapted(source, report, [each.module for each in experts])
    _require_dtype(written.weights, after, main_dtype(written.config))
    skipped = _skipped(source, written.config, before)
    return ExportPlan(written, _as_told(skipped, report, before, after), after)


def _container(source: Path, report: Report, before: Container, name: str) -> Container:
    """The one to write."""
    settings = report.results.settings
    if not isinstance(before, Integers):
        levels = f"{settings.quant_type} levels in {before.name}, which would be rounded"
        model = "MODEL" if report.model is None else report.model.id
        raise UnsupportedModel(
            f"{source} has no integer codes that another container could hold",
            cause=f"it has {levels if before.quantizes else 'weights in 16 bits, for plain LoRA'}",
            hint=f"loftq quantize -m {model} --container {name} -o OUT",
        )
    if name == before.name:
        raise UsageError(f"{source} is in {name} already", hint="choose another --container")
    after = kind_of(name, settings.bits)
    if not issubclass(after, Integers):
        raise UsageError(
            f"{name} has no integer codes",
            cause=f"those of {source} would be rounded to other levels",
            hint=f"loftq quantize --container {name}, from the original",
        )
    return after.of(settings)


def _require_unadapted(source: Path, report: Report, experts: Sequence[str]) -> None:
    """Refuses an adapter whose targets hit experts too, once a reader holds those as layers."""
    if not (experts and report.results.layers):
        return
    hit = missing_modules(read_trained(source / ADAPTER_DIRECTORY), experts)
    if hit:
        raise InvalidSetting(
            f"the adapter would be put on {hit[0]} too ({len(hit)} such matrices)",
            cause="its config chooses layers by the ends of their names, for readers that hold "
            "experts as one",
            hint="make the directory from the original: loftq quantize --experts quantize "
            "--container gptq",
        )


def _require_dtype(weights: Sequence[Weight], container: Container, main: str) -> None:
    """Refuses a weight in another dtype than the model's where no tensor could say so."""
    for weight in weights:
        as_main = container.planned(replace(weight, dtype=main))
        if weight.dtype != main and container.planned(weight) == as_main:
            raise InvalidSetting(
                f"{weight.module} does not fit into {container.name}",
                cause=f"it is computed in {DTYPE_NAMES[weight.dtype]}, and there all layers are in "
                f"the dtype of the model, {DTYPE_NAMES[main]}",
                hint="make the directory again: loftq quantize --dtype "
                f"{DTYPE_NAMES[main]} --container {container.name}",
            )


def _as_told(
    skipped: list[str], report: Report, before: Container, after: Container
) -> Sequence[str]:
    """The list as the readers of the other container want it (`plan.skip_list`)."""
    left = {each.name: each.reason for each in report.results.untouched}
    counted = report.results.experts
    quantized = counted is not None and counted.quantized > 0
    experts = "quantize" if quantized else report.results.settings.experts
    told, wanted = (more_skipped(each, experts, left) for each in (before, after))
    return skipped if told == wanted else sorted({*skipped} - told | wanted)


def _skipped(source: Path, config: Mapping[str, Any], container: Container) -> list[str]:
    quantization = config.get("quantization_config")
    skipped = quantization.get(container.skip_list) if isinstance(quantization, dict) else None
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise CorruptCheckpoint(
            f"{source / CONFIG_FILE} does not describe what is stored",
            cause=f"its quantization_config has no list called {container.skip_list}",
            hint=COPY_AGAIN,
        )
    return skipped
