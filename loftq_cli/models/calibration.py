"""What the inputs of linear layers look like on a text: their second moments, by running the model.

    G = E[x·xᵀ]    (in × in), over all tokens that reach the layer

The model runs one layer block after the other (see `models.layerwise`), so that the moments of one
are in memory and not those of all: 0.7 GB for a block of a 7B Llama, 22 GB for all of it.

Where quantized layers are followed, a second stream runs through the same blocks, with what their
layers have become. Layers take turns in a block: those that are given the same tensor (q, k and v;
o; gate and up; down) are looked at together, in a pass of either stream that ends with them, and
then quantized before the next are. In a Llama these are five to six passes instead of one, and of
the moments there are two matrices, but those of one turn only.

That layers wait for those before them in their own block too is what makes it worth while. When all
of a block were looked at side by side, each made good what the blocks before had lost, so that it
was made good more than once: KL of the demo in NF2 rose by 32 % where in turns it falls by 26 %.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.errors import LoftqError, UnsupportedModel
from loftq_cli.models.architecture import Architecture, read_architecture
from loftq_cli.models.dtypes import stored_dtype
from loftq_cli.models.expert_inputs import ExpertInputs, places_in
from loftq_cli.models.layerwise import StagedModel, replaced
from loftq_cli.models.loading import LoadedModel, load_tokenizer, placement, read_weights
from loftq_cli.models.moments import NO_CALIBRATION, StageInputs
from loftq_cli.models.quantized_layers import (
    QuantizedLayer,
    quantized_experts,
    quantized_forwards,
    quantized_product,
)
from loftq_cli.models.routed import ExpertPlace
from loftq_cli.models.source import read_config
from loftq_cli.models.streams import FOR_HIDDEN_STATES, Stream
from loftq_cli.models.texts import digest, read_text, text_windows

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.core.input_moments import Drift

# Taken evenly from the text. Five times as many took 5 % off the KL of a small model.
MOST_TOKENS = 65_536
# As many keep a processor busy, and a layer block's activations in hundreds of megabytes.
_BATCH_TOKENS = 4096
# Where two streams are compared, all that a block's layers are given and put out is held for one
# batch: a quarter of a gigabyte in a 7B Llama in float32.
_PAIRED_TOKENS = 1024
# Of the memory that may be used, what weights may take; the rest is for moments and activations.
_FOR_WEIGHTS = 0.5


class Calibration:
    """Second moments of the inputs of some modules, in the order in which a model computes them.

    Attributes:
        order: the modules, stage after stage as they run. Asked for in this order, every stage
            runs once.
        text_sha256: what the text is known by.
        windows: windows of the text that are run, and their ``window_length`` in tokens.
        unseen: modules, of stages that have run, which no token reached (experts that were
            never chosen): their moments are zero.
        on_disk: bytes of hidden states that lie on the disk between two stages.
    """

    def __init__(
        self,
        model: Any,
        windows: Tensor,
        modules: Sequence[str],
        device: str,
        text_sha256: str = "",
        *,
        experts: Mapping[str, ExpertPlace] | None = None,
        scratch: Path | None = None,
        max_memory_bytes: int | None = None,
    ) -> None:
        """``experts`` are matrices of experts, with their places in the model.

        Hidden states lie in ``scratch`` where they take too much of ``max_memory_bytes``."""
        self.text_sha256 = text_sha256
        self.windows = int(windows.shape[0])
        self.window_length = int(windows.shape[1])
        self._model = model
        self._ids = windows
        self._device = device
        self._scratch = scratch
        self._limit = max_memory_bytes
        self._experts = dict(experts or {})
        # The matrices that a module of experts holds. To the model it is one layer more.
        self._held: dict[str, list[str]] = {}
        for name, place in self._experts.items():
            self._held.setdefault(place.module, []).append(name)
        layers = [*dict.fromkeys(modules), *self._held]
        self._staged = StagedModel(model, windows, layers, device)
        self._quantized: Callable[[str], QuantizedLayer] | None = None
        self._inputs: StageInputs | ExpertInputs | None = None
        self._turn = -1
        self.order = self._in_order(self._staged.stages)
        self.unseen: set[str] = set()
        self._restart()

    @property
    def tokens(self) -> int:
        """Tokens that the model is run on. With fewer than its inputs, a layer's G is singular."""
        return self.windows * self.window_length

    def turn_of(self, module: str) -> tuple[Any, ...]:
        """What is the same for modules that are looked at together, and known before any other.

        Of an expert, matrices of one stack: its second waits for what its first has become.
        """
        place = self._experts.get(module)
        within = () if place is None else (place.expert, place.parameter)
        return self._turn_of[module], *within

    def follow(self, quantized: Callable[[str], QuantizedLayer]) -> bool:
        """From now on inputs are those that a model gives whose earlier layers are quantized.

        Those are the layers that are called before, in its own block too; only those that are given
        the same tensor do not wait for each other. What is outside of all layer blocks comes last,
        also where it runs before them. ``quantized`` is asked for each layer, once, when one is
        asked about that comes after it. From now on ``order`` is the order of calls.

        Returns:
            whether that is another thing: through a model that runs in one piece it would take a
            run for every layer, and nothing is changed.
        """
        if len(self._staged.stages) == 1:
            return False
        self._quantized = quantized
        self.order = self._in_order([modules for _, modules in self._staged.turns])
        self._restart()
        return True

    def knows(self, module: str) -> bool:
        """Whether it can be asked about: of some experts it cannot be seen what they are given."""
        return module in self._turn_of

    def moments(self, module: str) -> Tensor:
        """E[x·xᵀ] of the inputs of ``module``: float32 (in × in), on the device, to be read only.

        Modules that are given the same tensor (q, k and v) get the same object. The model runs up
        to the module's stage, from its beginning if it is past that already; the moments of other
        stages are freed.

        Raises:
            LoftqError: the module's inputs are NaN or infinite, or overflow when squared.
            UnsupportedModel: what a module is given changed in the course of the text.
        """
        found = self._of(module)
        if broken := found.broken(module):
            dtype = str(self._model.dtype).removeprefix("torch.")
            raise LoftqError(
                f"the inputs of {module} are NaN, infinite or too large to be squared on the "
                f"calibration text: {broken} of {found.tokens(module)} tokens",
                cause=f"a weight before it is broken, or activations overflow {dtype}",
                hint=f"look at the model's own output on this text, or {NO_CALIBRATION}",
            )
        return found.moments(module)

    def drift(self, module: str) -> Drift | None:
        """How far from the original's the inputs are whose :meth:`moments` these are.

        None where they are the original's: unless quantized layers are followed, and in the first
        turn. Modules that are given the same tensor get the same matrix; one that writes to the
        residual stream has another, of what that has lost.
        """
        return self._of(module).drift(module)

    def _in_order(self, stages: Iterable[Sequence[str]]) -> list[str]:
        """All modules that can be asked about."""
        return [name for stage in stages for each in stage for name in self._held.get(each, [each])]

    def _of(self, module: str) -> StageInputs | ExpertInputs:
        """What is known of the module's turn, which runs first if it has not."""
        turn = self._turn_of[module]
        if turn < self._turn:
            self._restart()
        if turn > self._turn:
            self._inputs = None
            self._inputs = self._run(*self._turns[turn])
            self._turn = turn
        assert self._inputs is not None
        return self._inputs

    def _restart(self) -> None:
        """Goes back to the first turn."""
        followed = self._quantized is not None
        most = _PAIRED_TOKENS if followed else _BATCH_TOKENS
        batches = self._ids.split(max(1, most // self.window_length))
        nbytes = (1 + followed) * self._staged.token_bytes * self.tokens
        spills = self._limit is not None and nbytes > self._limit * FOR_HIDDEN_STATES
        self.on_disk = nbytes if spills and self._scratch is not None else 0
        place = self._scratch if self.on_disk else None
        self._original, self._runtime = Stream(batches, place), Stream(batches, place)
        # Of the stage that the quantized model is at, what its modules become.
        self._layers: dict[str, QuantizedLayer] = {}
        # The modules that are looked at in one pass, and the stage that they are in.
        turns = self._staged.turns if followed else [*enumerate(self._staged.stages)]
        # Experts are looked at by themselves, whatever they are given.
        self._turns = [
            (stage, part) for stage, modules in turns for part in self._apart(modules) if part
        ]
        self._turn_of = {
            name: turn
            for turn, (_, modules) in enumerate(self._turns)
            for name in self._in_order([modules])
        }
        self._turn = -1
        self._inputs = None

    def _apart(self, modules: list[str]) -> list[list[str]]:
        """The linear modules, and each that holds experts."""
        linear = [module for module in modules if module not in self._held]
        return [linear, *([module] for module in modules if module in self._held)]

    def _run(self, stage: int, modules: list[str]) -> StageInputs | ExpertInputs:
        """Runs the model up to this stage and through it, and looks at what these are given."""
        while self._original.done < stage:
            for _ in self._staged.run(self._original):
                pass
        here = [those for number, those in self._turns if number == stage]
        last = here[-1] is modules
        # Before the very first nothing is quantized.
        paired = self._quantized is not None and self._turns[0][1] is not modules
        forwards = self._caught_up(stage, here[: here.index(modules)]) if paired else {}
        inputs = self._watched(modules, paired=paired)
        original = self._staged.run(self._original, ahead=last)
        again = self._staged.run(self._runtime, ahead=False)
        with inputs.watching():
            for batch in self._original.batches:
                inputs.begin(batch.numel(), whole=last)
                next(original)
                if paired:
                    inputs.now_quantized()
                    with replaced(self._model, forwards):
                        next(again)
                inputs.end()
        next(original, None)  # so that it comes to its end
        inputs.finish()
        self.unseen.update(name for name in self._in_order([modules]) if not inputs.tokens(name))
        return inputs

    def _watched(self, modules: list[str], *, paired: bool) -> StageInputs | ExpertInputs:
        """What is to see what these modules are given."""
        if (held := self._held.get(modules[0])) is not None:
            experts = self._model.get_submodule(modules[0])
            places = {name: self._experts[name] for name in held}
            return ExpertInputs(experts, places, self._device, self._become if paired else None)
        calls = [self._staged.calls[module] for module in modules]
        return StageInputs(
            self._model,
            {module: self._staged.groups[module] for module in modules},
            self._device,
            paired=paired,
            calls=sum(calls) if self._quantized is not None and all(calls) else 0,
            places={
                module: self._staged.places[module]
                for module in modules
                if module in self._staged.places
            },
        )

    def _caught_up(self, stage: int, before: list[list[str]]) -> dict[str, Callable[..., Any]]:
        """Runs the quantized model up to the stage; what those of it compute that came before."""
        while self._runtime.done < stage:
            forwards = self._forwards(self._staged.stages[self._runtime.done])
            with replaced(self._model, forwards):
                for _ in self._staged.run(self._runtime):
                    pass
            self._layers = {}
        return self._forwards([module for modules in before for module in modules])

    def _forwards(self, modules: list[str]) -> dict[str, Callable[..., Any]]:
        linear, *_ = self._apart(modules)
        layers = {module: self._become(module) for module in linear}
        forwards = quantized_forwards(self._model, layers, self._device)
        for path in modules:
            if (held := self._held.get(path)) is not None:
                places = {name: self._experts[name] for name in held}
                product = quantized_product(places, self._become, self._device)
                forwards[path] = quantized_experts(self._model.get_submodule(path), product)
        return forwards

    def _become(self, module: str) -> QuantizedLayer:
        assert self._quantized is not None
        if module not in self._layers:
            self._layers[module] = self._quantized(module)
        return self._layers[module]


@contextmanager
def open_calibration(
    directory: Path,
    text: Path,
    modules: Sequence[str],
    *,
    device: str,
    experts: Sequence[str] = (),
    trust_remote_code: bool = False,
    max_memory_bytes: int | None = None,
    most_tokens: int = MOST_TOKENS,
) -> Iterator[Calibration]:
    """The model in ``directory``, ready to say what ``modules`` are given on ``text``.

    ``experts`` are matrices of experts as the files name them. Not of all classes it can be seen
    what reaches them (see `Calibration.knows`).

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
            **placement(device, max_memory_bytes, _FOR_WEIGHTS),
        )
        for module in model.modules():
            # Nothing is generated: keys and values of earlier tokens need not be kept.
            if hasattr(module, "config") and getattr(module.config, "use_cache", None):
                module.config.use_cache = False
        yield Calibration(
            model.eval(),
            windows,
            modules,
            device,
            digest(content),
            experts=places_in(architecture, model, experts),
            scratch=Path(scratch),
            max_memory_bytes=max_memory_bytes,
        )


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
            hint=NO_CALIBRATION,
        )
    tokenizer = load_tokenizer(directory, trust_remote_code)
    if tokenizer is None:
        raise UnsupportedModel(
            f"{directory} has no tokenizer, which a calibration text needs",
            cause="there is no tokenizer.json",
            hint=f"put the model's tokenizer files there, or {NO_CALIBRATION}",
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
