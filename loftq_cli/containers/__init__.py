"""How quantized weights lie in files: a container a file.

To add one, write a module here that has a subclass of :class:`base.Container` as ``CONTAINER``, and
its numerics in ``core`` if they are new. Nothing lists the modules: they are found.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from functools import cache
from importlib import import_module

from loftq_cli.containers.base import Container, Form


@cache
def containers() -> tuple[type[Container], ...]:
    """All of them, by the names of their modules."""
    modules = sorted(each.name for each in pkgutil.iter_modules(__path__) if each.name != "base")
    return tuple(import_module(f"{__name__}.{name}").CONTAINER for name in modules)


def widths() -> tuple[int, ...]:
    """The bits that a weight can be quantized to."""
    found = {bits for each in containers() if each.quantizes for bits in each.all_widths}
    return tuple(sorted(found))


def kind_of(bits: int) -> type[Container]:
    """The container for codes of so many bits.

    Raises:
        KeyError: there is none.
    """
    return {width: each for each in reversed(containers()) for width in each.all_widths}[bits]


def container_of(bits: int, form: Form) -> Container:
    """The same with what it takes of the options.

    Raises:
        KeyError: there is none.
        UsageError: they contradict it.
    """
    return kind_of(bits).of(form)


def weights_in(names: Iterable[str]) -> set[str]:
    """Of a checkpoint's tensors, those weights (`X.weight`) that are stored quantized."""
    names = list(names)
    return set().union(*(each.weights_in(names) for each in containers()))


def layer_classes() -> frozenset[str]:
    """The classes of layers that hold quantized weights."""
    return frozenset(each.layer_class for each in containers() if each.quantizes)
