"""What a `merge` run will write: pure data, made from report, headers, config and adapter.

**Which base an adapter was trained on.** The config of the start beside a backbone has a digest of
what the backbone was made from (`fingerprint.base_identity`), in a place that PEFT (0.18 to 0.21)
keeps through training and saving (`checkpoint/adapter.py`). Where the adapter has it too, that
decides, whatever the directories are called, and in whichever container the codes lie. An adapter
that was begun anew on the base, or trained without a task type, has none. Then it is refused if its
base has another name than the directory has or had when it was written. Two directories of the same
name, such as one that was written again with other bits, are not told apart by that. But an adapter
that was trained from the start of a directory still resembles it; of one that does not, it is said
that it was begun anew on this base, or belongs to another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from loftq_cli import __version__
from loftq_cli.checkpoint.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_DIRECTORY,
    ADAPTER_NAME,
    base_of,
    other_base,
)
from loftq_cli.checkpoint.index import INDEX_FILE, cast_info, load_json
from loftq_cli.checkpoint.safetensors import Header, TensorInfo, shown
from loftq_cli.checkpoint.writer import PlannedTensor, hash_file
from loftq_cli.containers.base import Weight
from loftq_cli.containers.unquantized import Unquantized
from loftq_cli.engines.report_file import read_report
from loftq_cli.engines.written import (
    ADAPTER_CONFIG_NAME,
    WeightFile,
    Written,
    not_as_reported,
    open_written,
    reported_container,
    require_same,
)
from loftq_cli.formats import DTYPE_NAMES, FLOATS
from loftq_cli.models.source import CONFIG_FILE, README_FILE, REPORT_FILE
from loftq_cli.models.stacking import Place
from loftq_cli.models.trained_adapter import (
    TrainedAdapter,
    cannot_merge,
    missing_modules,
    read_trained,
    with_experts,
)

if TYPE_CHECKING:
    from loftq_cli.models.architecture import Architecture

_PLAIN = Unquantized(Unquantized.number_types[0])
_SHORT = {long: short for short, long in DTYPE_NAMES.items()}
_MADE_ANEW = {REPORT_FILE, README_FILE, CONFIG_FILE, INDEX_FILE}


@dataclass(frozen=True)
class MergePlan:
    """A directory, the model class of it, and the adapter to fold into it.

    ``heads`` are the tensors of the adapter that take the place of some of the model. ``dtype`` is
    torch's name of that to write; None: of each tensor its own.
    """

    written: Written
    architecture: Architecture
    adapter: TrainedAdapter
    heads: Mapping[str, tuple[Header, TensorInfo]]
    dtype: str | None

    @property
    def copied(self) -> list[str]:
        """The files that stay as they are."""
        written = self.written
        others = [name for name in written.listed if name not in {*_MADE_ANEW, *written.files}]
        return [name for name in others if not name.startswith(f"{ADAPTER_DIRECTORY}/")]

    @property
    def merged(self) -> list[str]:
        """The modules whose weights the adapter changes."""
        weights = self.written.weights
        return [each.module for each in weights if each.module in self.adapter.pairs]

    @property
    def main_dtype(self) -> str:
        """That of most merged weights, torch's name of it."""
        dtypes = [self.plain(weight)[0].dtype for weight in self.written.weights]
        return DTYPE_NAMES[max(sorted(set(dtypes)), key=dtypes.count)]

    def plain(self, weight: Weight) -> list[PlannedTensor]:
        """The one tensor that a weight becomes: `X.weight`, in the source's orientation."""
        dtype = weight.dtype if self.dtype is None else _SHORT[self.dtype]
        return _PLAIN.planned(replace(weight, dtype=dtype))

    @cached_property
    def stacks(self) -> dict[str, list[tuple[Weight, Place]]]:
        """Matrices of experts in the order of the parameter that they become, by its name.

        They are those for which transformers has no rule that stacks them.
        """
        found: dict[str, list[tuple[Weight, Place]]] = {}
        for weight in self.written.weights:
            if (held := self.architecture.stacks.restacked(weight.name)) is not None:
                found.setdefault(held.place.tensor, []).append((weight, held.place))
        return {
            parameter: sorted(each, key=lambda pair: pair[1].index)
            for parameter, each in found.items()
        }

    def form(self, weight: Weight) -> list[PlannedTensor]:
        """What the file has in the place of a weight; all matrices of a stack in that of one."""
        planned = self.plain(weight)
        if (held := self.architecture.stacks.restacked(weight.name)) is None:
            return planned
        if self.stacks[held.place.tensor][0][0] != weight:
            return []
        return [replace(planned[0], name=held.place.tensor, shape=held.shape)]

    def made_from(self) -> dict[str, Any]:
        """What decides the bytes of the result."""
        directory = self.adapter.directory
        return {
            "loftq": __version__,
            "files": {name: each.sha256 for name, each in self.written.listed.items()},
            "adapter": {
                name: hash_file(path).sha256
                for name, path in (
                    (ADAPTER_CONFIG, directory / ADAPTER_CONFIG),
                    (self.adapter.header.path.name, self.adapter.header.path),
                )
            },
            "dtype": self.dtype,
        }


def plan_merge(
    source: Path,
    adapter: Path | None,
    dtype: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> MergePlan:
    """Decides for every tensor and file what becomes of it; no weight of the model is read.

    Args:
        adapter: where PEFT saved one; None: the start that lies in the directory itself.

    Raises:
        ModelNotFound: the directory is nothing that loftq wrote, or there is no adapter.
        UnsupportedModel: the adapter cannot be folded in, or was trained on another base.
        CorruptCheckpoint: report and files contradict each other.
    """
    report = read_report(source)
    container = reported_container(source, report)
    own = source / ADAPTER_DIRECTORY
    trained = read_trained(own if adapter is None else adapter)
    written, architecture = open_written(
        source, report, container, trust_remote_code=trust_remote_code
    )
    if _is_own(written, trained):
        require_same(
            source / ADAPTER_NAME, hash_file(source / ADAPTER_NAME), written.listed[ADAPTER_NAME]
        )
    _require_base(written, trained)
    trained = with_experts(trained, architecture, [weight.name for weight in written.weights])
    _require_layers(written, trained, architecture)
    if dtype is not None:
        written = _cast(written, dtype)
    heads = _heads(written, trained, architecture)
    plan = MergePlan(written, architecture, trained, heads, dtype)
    _require_stacks(plan)
    return plan


def start_of(plan: MergePlan) -> TrainedAdapter | None:
    """The adapter that the directory came with, to be compared with.

    None where it is the same, or where the adapter is known to be for this base.
    """
    written, adapter = plan.written, plan.adapter
    known = None not in _bases(written, adapter)
    if known or not written.report.results.layers or _is_own(written, adapter):
        return None
    return read_trained(written.source / ADAPTER_DIRECTORY)


def _is_own(written: Written, adapter: TrainedAdapter) -> bool:
    own = written.source / ADAPTER_DIRECTORY
    return own.is_dir() and adapter.directory.samefile(own)


def _bases(written: Written, adapter: TrainedAdapter) -> tuple[str | None, str | None]:
    """Which base the adapter says that it is for, and which the directory says that it is."""
    return base_of(adapter.config), base_of(_own_config(written))


def _own_config(written: Written) -> Mapping[str, Any]:
    """The config of the adapter that the directory came with, if there was one."""
    if not written.report.results.layers:
        return {}
    return load_json(written.source / ADAPTER_CONFIG_NAME)


def _require_base(written: Written, adapter: TrainedAdapter) -> None:
    """The adapter is for what lies here; where it does not say, it names the directory.

    Names are those that the directory has, or had at first.
    """
    if None not in _bases(written, adapter):
        cause = other_base(adapter.config, _own_config(written), written.source)
        if cause is None:
            return
        raise cannot_merge(
            adapter.directory,
            cause,
            hint="give the directory that it was trained on; quantized again in the same way, it "
            "is known again",
        )
    first = _own_config(written).get("base_model_name_or_path", written.report.results.output)
    names = {PurePath(str(first)).name, written.source.resolve().name}
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or PurePath(named).name not in names:
        said = f"{shown(named)}" if isinstance(named, str) else "none"
        raise cannot_merge(
            adapter.directory,
            f"it was trained on another base: base_model_name_or_path in its {ADAPTER_CONFIG} is "
            f"{said}, and this one is called {' or '.join(sorted(map(repr, names)))}",
            hint="give the directory that it was trained on; if that is this one by another name, "
            f"write its name into {ADAPTER_CONFIG}",
        )


def _require_layers(written: Written, adapter: TrainedAdapter, architecture: Architecture) -> None:
    """Every pair of A and B belongs to a layer of the report, in its shape, and none is missing.

    Experts, which most models hold as one, are no layers that PEFT would find.
    """
    shapes = {weight.module: weight.shape for weight in written.weights}
    expert_shape = architecture.expert_shape
    experts = {each.module for each in written.weights if expert_shape(each.name) is not None}
    for module, pair in adapter.pairs.items():
        if module not in shapes:
            raise cannot_merge(
                adapter.directory,
                f"it adapts {shown(module)}, which is none of the {len(shapes)} layers in "
                f"{REPORT_FILE}: they are what merging is proven for",
                hint="train it on layers that `loftq quantize` quantized (an output head that is "
                "tied to the embedding would change both)",
            )
        if pair.shape != shapes[module]:
            raise cannot_merge(
                adapter.directory,
                f"it was trained on another base: {shown(module)} is {list(shapes[module])} here, "
                f"and A and B are for {list(pair.shape)}",
            )
    if missing := missing_modules(adapter, [name for name in shapes if name not in experts]):
        raise cannot_merge(
            adapter.directory,
            f"its config also targets {shown(missing[0])} ({len(missing)} such layers), for which "
            "it has no A and B",
        )


def _require_stacks(plan: MergePlan) -> None:
    """All matrices of a stack are there, in one file."""
    for parameter, matrices in plan.stacks.items():
        names = {weight.name for weight, _ in matrices}
        whole = any(
            names <= {each.name for each in file.weights} for file in plan.written.files.values()
        )
        if len(matrices) != matrices[0][1].count or not whole:
            raise not_as_reported(parameter, "no weight file has the matrices of all experts")


def _heads(
    written: Written, adapter: TrainedAdapter, architecture: Architecture
) -> dict[str, tuple[Header, TensorInfo]]:
    """The trained heads by the tensors whose place they take, to be read in their dtype."""
    plain = {
        entry.name: entry
        for file in written.files.values()
        for entry in file.entries
        if isinstance(entry, TensorInfo)
    }
    tensors = {name: tensor for tensor, name in architecture.parameters_of(plain).items()}
    found = {}
    for parameter, info in adapter.heads.items():
        place = plain.get(tensors.get(parameter, ""))
        if place is None or place.shape != info.shape:
            has = "has none" if place is None else f"has it as {list(place.shape)}"
            raise cannot_merge(
                adapter.directory,
                f"it brings {shown(parameter)} of shape {list(info.shape)}, and the model in "
                f"{written.source} {has} among the weights that are not quantized",
                hint="quantize the model with this head on it, and train that",
            )
        if architecture.is_tied(parameter):
            raise cannot_merge(
                adapter.directory,
                f"it brings {shown(parameter)}, which this model ties to another weight: merged, "
                "both would change",
                hint="leave it out of modules_to_save",
            )
        if not {info.dtype, place.dtype} <= set(FLOATS):
            raise cannot_merge(
                adapter.directory, f"{shown(parameter)} in it is no matrix of numbers"
            )
        stored = None if info.dtype == place.dtype else info.dtype
        found[place.name] = (adapter.header, replace(info, dtype=place.dtype, stored=stored))
    return found


def _cast(written: Written, dtype: str) -> Written:
    """The same with all that is not quantized read in this dtype."""
    files = {}
    for name, file in written.files.items():
        tensors = {
            info.name: cast_info(info, dtype) if info.name not in file.parts else info
            for info in file.header.tensors.values()
        }
        files[name] = WeightFile(replace(file.header, tensors=tensors), file.parts)
    return replace(written, files=files)
