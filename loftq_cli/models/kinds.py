"""Linear layers by kind, and the shortest names that choose exactly a given set of them.

PEFT takes a target module as the end of a layer's path: `c_proj` chooses `h.0.attn.c_proj` and
`h.0.mlp.c_proj`, `attn.c_proj` only the first. Numbers in a path say which of many a layer is; a
name without them speaks of every block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from loftq_cli.models import layers as words
from loftq_cli.models.layers import LinearLayer
from loftq_cli.models.outline import Outline
from loftq_cli.schema import SkippedModule

VECTORS = "norms and biases"


@dataclass(frozen=True)
class Kind:
    """Layers of one name and one shape.

    ``name`` goes into --target-modules as it stands. In a model where no name without a number
    chooses these layers alone, ``also_selects`` names the other kinds that it chooses too.
    """

    name: str
    layers: tuple[LinearLayer, ...]
    also_selects: tuple[str, ...] = ()

    @property
    def out_features(self) -> int:
        return self.layers[0].out_features

    @property
    def in_features(self) -> int:
        return self.layers[0].in_features

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)


def kinds(layers: Sequence[LinearLayer]) -> list[Kind]:
    """The layers by kind: the end of the name, and more of it where shapes differ."""
    named: dict[tuple[str, int, int], list[LinearLayer]] = {}
    for layer, name in zip(layers, _kind_names(layers), strict=True):
        key = name, layer.out_features, layer.in_features
        named.setdefault(key, []).append(layer)
    chosen_by = {name: [each for each in named if _ends(each[0], name)] for name, _, _ in named}
    return [
        Kind(key[0], tuple(group), tuple(each[0] for each in chosen_by[key[0]] if each != key))
        for key, group in named.items()
    ]


def skipped_modules(outline: Outline) -> list[SkippedModule]:
    """What is left as it is, largest first; vectors, of which there are many, as one."""

    def skipped(
        name: str, reason: str, count: int, parameters: int, shapes: set[tuple[int, ...]]
    ) -> SkippedModule:
        return SkippedModule(
            name=name,
            reason=reason,
            count=count,
            shape=list(*shapes) if len(shapes) == 1 else None,
            parameters=parameters,
            share_of_parameters=parameters / outline.parameters,
        )

    groups: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for left in outline.inventory.left:
        parts = left.tensor.removesuffix(".weight").split(".")
        name = ".".join([part for part in parts if not part.isdigit()][-2:])
        groups.setdefault((name, left.reason), []).append(left.shape)
    found = [
        skipped(name, reason, len(shapes), sum(map(prod, shapes)), set(shapes))
        for (name, reason), shapes in groups.items()
    ]
    found.sort(key=lambda each: -each.parameters)
    count, parameters = outline.vectors
    if count:
        found.append(skipped(VECTORS, words.NOT_A_MATRIX, count, parameters, set()))
    return found


def shortest_names(chosen: Collection[LinearLayer], layers: Iterable[LinearLayer]) -> list[str]:
    """Names that, as target modules, choose exactly ``chosen`` out of ``layers``.

    A number is part of a name only where nothing shorter tells these layers from others.
    """
    wanted = {layer.module for layer in chosen}
    others = {
        tail for layer in layers if layer.module not in wanted for tail in _tails(layer.module)
    }
    names: dict[str, None] = {}
    for module in (layer.module for layer in chosen):
        names[next(tail for tail in _tails(module) if tail not in others)] = None
    return list(names)


def _kind_names(layers: Sequence[LinearLayer]) -> list[str]:
    """One name for each layer: as short as it can be while all that it chooses look alike."""
    tails = [_plain_tails(layer.module) for layer in layers]
    shapes: dict[str, set[tuple[int, int]]] = {}
    for layer, own in zip(layers, tails, strict=True):
        for tail in own:
            shapes.setdefault(tail, set()).add((layer.out_features, layer.in_features))
    return [next((tail for tail in own if len(shapes[tail]) == 1), own[-1]) for own in tails]


def _plain_tails(module: str) -> list[str]:
    """h.0.attn.c_proj -> c_proj, attn.c_proj: what ends the path and holds no number."""
    tails = _tails(module)
    numbered = (n for n, tail in enumerate(tails) if tail.partition(".")[0].isdigit())
    return tails[: next(numbered, len(tails))] or tails[:1]


def _tails(module: str) -> list[str]:
    """h.0.attn -> attn, 0.attn, h.0.attn"""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _ends(name: str, tail: str) -> bool:
    return name == tail or name.endswith(f".{tail}")
