"""How quantized weights lie in files: a container a file.

To add one, write a module here that has a subclass of :class:`base.Container` as ``CONTAINER``, and
its numerics in ``core`` if they are new. Nothing lists the modules: they are found. Where two have
the same ``name``, the bits of a run choose between them.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from typing import Any

from loftq_cli.containers.base import Container, Form
from loftq_cli.formats import DEFAULT_CONTAINER


@cache
def containers() -> tuple[type[Container], ...]:
    """All of them, by the names of their modules."""
    names = sorted(each.name for each in pkgutil.iter_modules(__path__))
    modules = [import_module(f"{__name__}.{name}") for name in names]
    return tuple(each.CONTAINER for each in modules if hasattr(each, "CONTAINER"))


def container_names() -> tuple[str, ...]:
    """What `--container` takes, the default first."""
    found = {each.name for each in containers() if each.quantizes} - {DEFAULT_CONTAINER}
    return (DEFAULT_CONTAINER, *sorted(found))


def widths() -> tuple[int, ...]:
    """The bits that a weight can be quantized to."""
    found = {bits for each in containers() if each.quantizes for bits in each.all_widths}
    return tuple(sorted(found))


def kind_of(name: str, bits: int) -> type[Container]:
    """The container of this name for codes of so many bits.

    Weights that are not quantized (16 bits) lie in the same way whatever the name.

    Raises:
        KeyError: there is none.
    """
    named = (each for each in reversed(containers()) if each.name == name or not each.quantizes)
    return {width: each for each in named for width in each.all_widths}[bits]


def container_of(name: str, bits: int, form: Form) -> Container:
    """The same with what it takes of the options.

    Raises:
        KeyError: there is none.
        UsageError: they contradict it.
    """
    return kind_of(name, bits).of(form)


def weights_in(names: Iterable[str]) -> set[str]:
    """Of a checkpoint's tensors, those weights (`X.weight`) that are stored quantized."""
    names = list(names)
    return set().union(*(each.weights_in(names) for each in containers()))


def holds_codes(module: Any) -> bool:
    """Whether a layer of a loaded model holds quantized weights."""
    return any(each.holds(module) for each in containers())
