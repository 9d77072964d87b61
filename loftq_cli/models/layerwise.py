"""A model run one layer block after the other, each on all batches before the next one begins.

So whatever is gathered in a layer block need not be held for all the others too. Between two of
them only the output of the first is kept (one hidden state for each token). It is always the
model's own forward that runs; layer blocks that had their turn return what was kept instead of
computing, and an exception ends the pass after the one whose turn it is. Masks, positions and
whatever else a layer block is given are therefore the model's own.

    stack          a ModuleList with the modules of interest in it; an encoder-decoder has two
    layer block    an entry of a stack
    stage          the turn of one layer block; in the last stage runs what lies outside of all
    stream         one run of the model through its stages; several can be under way, one ahead of
                   the other or with other weights

Not every model can be run like this: some use a layer block twice (ALBERT), some let them exchange
more than their output. So a short text is run first in one piece and then in stages. Where that
does not give the same, there is one stage only, and all of the model runs in it.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import UnsupportedModel, told_as
from loftq_cli.models.residual_stream import Place, places
from loftq_cli.models.streams import Stream

if TYPE_CHECKING:
    from torch import Tensor

_PROBE_TOKENS = 16
# The same sums in another order differ by less, in bfloat16 too: of a value, and of a typical one.
_SAME = {"relative": 1e-2, "typical": 1e-3}


class Stop(Exception):
    """Ends a pass where the rest of the model is of no interest."""


class StagedModel:
    """A model that reads token ids, run in stages.

    Attributes:
        stages: for each stage the modules of interest that run in it.
        stage_of: module to the number of its stage.
        groups: module to the first of those in its stage that are always given the same tensor.
        turns: the modules by group, in the order in which groups are first called in a pass through
            their stage, with the number of that.
        calls: how often a pass calls each module, 0 where that depends on the text.
        places: what modules that write to the residual stream add to. Not of those that share
            their input: they are not quantized one after the other.
        token_bytes: what a stream keeps of a token.
    """

    def __init__(self, model: Any, windows: Tensor, modules: Sequence[str], device: str) -> None:
        """``windows`` are token ids to try it with; the whole model computes on ``device``.

        Raises:
            UnsupportedModel: the model does not run on token ids alone.
        """
        self._model = model
        self._device = device
        self._stacks = _stacks(model, modules)  # layer block to stack
        head = model.get_output_embeddings()
        if head is not None and not any(model.get_submodule(name) is head for name in modules):
            # Logits are of no use here, and the largest of all tensors.
            head.register_forward_pre_hook(_stop_here)
        probe = windows[:1, :_PROBE_TOKENS]
        self._order, inputs, places = self._trace(probe, modules)
        self._turns = {name: stage for stage, name in enumerate(self._order)}
        self.stage_of = {module: self._find_stage(module) for module in modules}
        self.stages: list[list[str]] = [[] for _ in range(len(self._order) + 1)]
        for module in modules:
            self.stages[self.stage_of[module]].append(module)
        first_with: dict[Any, str] = {}
        self.groups = {
            # A module that saw nothing, such as an expert, says nothing about what it shares.
            module: first_with.setdefault(
                (self.stage_of[module], inputs.get(module, module)), module
            )
            for module in modules
        }
        self.calls = {module: len(inputs.get(module, ())) for module in modules}
        sizes = Counter(self.groups.values())
        self.places = {
            module: place for module, place in places.items() if sizes[self.groups[module]] == 1
        }
        # What was not called, such as an expert, comes last.
        numbers = {module: number for number, module in enumerate(inputs)}
        self.turns = [
            (stage, [module for module in here if self.groups[module] == leader])
            for stage, here in enumerate(self.stages)
            for leader in sorted(
                dict.fromkeys(self.groups[module] for module in here),
                key=lambda leader: numbers.get(leader, len(numbers)),
            )
        ]

    def run(self, stream: Stream, *, ahead: bool = True) -> Iterator[None]:
        """Runs the stream's next stage, one batch a step; unless ``ahead`` it stays before that."""
        for number in range(len(stream.batches)):
            self._pass(stream, number, keep=ahead)
            yield
        stream.done += ahead

    def _find_stage(self, module: str) -> int:
        owner = next((name for name in self._stacks if module.startswith(f"{name}.")), None)
        return len(self._order) if owner is None else self._turns.get(owner, len(self._order))

    def _trace(
        self, ids: Tensor, modules: Sequence[str]
    ) -> tuple[list[str], dict[str, tuple[Any, ...]], dict[str, Place]]:
        """The layer blocks that can have their own turn, in order, and who shares which inputs.

        And who writes to the residual stream of such a block.

        The inputs of a module are the identities of the tensors that it is called with. Those that
        are not called have none; the others come in the order of their first calls.
        """
        outputs: dict[str, Any] = {}
        calls: Counter[str] = Counter()
        put_out: dict[str, list[Tensor]] = {}  # in the layer block that runs
        found: dict[str, Place] = {}
        alive: list[Tensor] = []  # or another tensor might get the identity of one that is gone
        inputs: dict[str, tuple[Any, ...]] = {}

        def note(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            put_out.clear()
            before = _copied(given(args, kwargs)) if args or kwargs else None
            outputs[name] = forward(*args, **kwargs)
            found.update(places(name, before, outputs[name], put_out))
            return outputs[name]

        def see(module: str, x: Tensor) -> None:
            alive.append(x)
            inputs[module] = (*inputs.get(module, ()), (id(x), x._version))

        def keep(module: str, y: Any) -> None:
            # Experts have no weight of their own.
            if hasattr(self._model.get_submodule(module), "weight"):
                put_out.setdefault(module, []).append(_copied(y))

        with (
            watched(self._model, modules, see, keep),
            told_as(
                UnsupportedModel,
                f"{type(self._model).__name__} cannot be run on text",
                "use a start that needs no calibration text",
            ),
        ):
            self._call(ids, note)
        order = list(outputs)
        self.token_bytes = sum(self._bytes(outputs).values()) // ids.numel()
        if any(count > 1 for count in calls.values()) or not self._agrees(ids, order, outputs):
            return [], inputs, {}
        return order, inputs, found

    def _bytes(self, outputs: Mapping[str, Any]) -> Counter[str]:
        """Of each stack, the largest of these outputs of layer blocks."""
        from torch import Tensor
        from torch.utils import _pytree

        found: Counter[str] = Counter()
        for name, output in outputs.items():
            leaves = _pytree.tree_leaves(output)
            found |= {self._stacks[name]: sum(x.nbytes for x in leaves if isinstance(x, Tensor))}
        return found

    def _agrees(self, ids: Tensor, order: list[str], outputs: dict[str, Any]) -> bool:
        """Whether the outputs are the same when each layer block has its own turn."""
        self._turns = {name: stage for stage, name in enumerate(order)}
        stream = Stream([ids])
        try:
            for name in order:
                for _ in self.run(stream):
                    pass
                if not _same(stream.output(0, self._stacks[name], "cpu"), outputs[name]):
                    return False
        except Exception as error:  # whatever a model needs from layer blocks that do not run
            if type(error).__name__ == "OutOfMemoryError":
                raise
            return False
        return True

    def _pass(self, stream: Stream, number: int, *, keep: bool) -> None:
        """Runs one batch up to the end of the stream's next stage, and may ``keep`` its output."""
        moved: dict[str, Any] = {}

        def step(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            turn, stack = self._turns.get(name), self._stacks[name]
            if turn is None:  # not called on its own in the trace: part of what lies outside
                return forward(*args, **kwargs)
            if turn == stream.done:
                output = forward(*args, **kwargs)
                if keep:
                    stream.keep(number, stack, output)
                raise Stop
            if turn > stream.done:
                raise RuntimeError(f"{name} runs before its turn")
            # What earlier ones return does not matter: only that of the last is read.
            if stack not in moved:
                moved[stack] = stream.output(number, stack, self._device)
            return moved[stack]

        self._call(stream.batches[number], step)

    def _call(self, ids: Tensor, forward: Callable[..., Any]) -> None:
        """The model's forward, with that of its layer blocks replaced.

        ``forward`` is given a layer block's name, its own forward, and the arguments of the call.
        """
        import torch

        ids = ids.to(self._device)
        accepted = inspect.signature(self._model.forward).parameters
        inputs = {"input_ids": ids}
        if "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones_like(ids)
        if self._model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        # Not `inference_mode`: its tensors do not tell whether they were changed in place.
        blocks = {name: functools.partial(forward, name) for name in self._stacks}
        with torch.no_grad(), replaced(self._model, blocks), suppress(Stop):
            self._model(**inputs)


@contextmanager
def replaced(model: Any, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """The model with other forwards of these modules; each is given its own as first argument."""
    modules = {name: model.get_submodule(name) for name in forwards}
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            own = module.forward
            module.forward = functools.update_wrapper(functools.partial(forwards[name], own), own)
        yield
    finally:
        for name, module in modules.items():
            if before[name] is None:
                module.__dict__.pop("forward", None)
            else:  # accelerate puts its own there
                module.forward = before[name]


@contextmanager
def watched(
    model: Any,
    modules: Sequence[str],
    see: Callable[[str, Tensor], None],
    put_out: Callable[[str, Tensor], None] | None = None,
) -> Iterator[None]:
    """Tells ``see`` of every tensor that one of these linear modules is given.

    And ``put_out`` of what it gives back.
    """

    def hook(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(name, given(args, kwargs))

    def after(put_out: Callable[..., None], name: str, module: Any, args: Any, y: Tensor) -> None:
        put_out(name, y)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            functools.partial(hook, name), with_kwargs=True
        )
        for name in modules
    ]
    if put_out is not None:
        handles += [
            model.get_submodule(name).register_forward_hook(functools.partial(after, put_out, name))
            for name in modules
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input among the arguments of a linear module's call."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def _copied(x: Any) -> Any:
    """It may be changed in place."""
    return x.clone() if hasattr(x, "clone") else x


def _stop_here(module: Any, args: tuple[Any, ...]) -> None:
    raise Stop


def _stacks(model: Any, modules: Sequence[str]) -> dict[str, str]:
    """Every layer block with its stack: the outermost ModuleLists that hold one of ``modules``."""
    from torch.nn import ModuleList

    found: dict[str, Any] = {}
    for module in modules:
        parts = module.split(".")
        for end in range(1, len(parts)):
            path = ".".join(parts[:end])
            if path in found:
                break
            candidate = model.get_submodule(path)
            if isinstance(candidate, ModuleList):
                found[path] = candidate
                break
    return {
        f"{path}.{name}": path
        for path, stack in found.items()
        for name, _ in stack.named_children()
    }


def _same(one: Any, other: Any) -> bool:
    import torch
    from torch.utils import _pytree

    ones, others = _pytree.tree_leaves(one), _pytree.tree_leaves(other)
    if len(ones) != len(others):
        return False
    for first, second in zip(ones, others, strict=True):
        if isinstance(first, torch.Tensor):
            a, b = first.float().cpu(), second.float().cpu()
            if a.shape != b.shape:
                return False
            typical = float(b.nan_to_num(0.0, 0.0, 0.0).abs().mean()) if b.numel() else 0.0
            atol = _SAME["typical"] * typical
            if not torch.allclose(a, b, rtol=_SAME["relative"], atol=atol, equal_nan=True):
                return False
    return True
