"""Linear layers whose weight their model reads itself, past the layer.

Mamba multiplies by `self.dt_proj.weight`, RWKV divides `block.attention.output.weight` in place,
Switch casts inputs to `self.wo.weight.dtype`. A 4-bit layer has packed bytes there, and what an
adapter adds is never seen. Which layers these are stands in the source of the model's classes, and
nowhere else: it is read, not run.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

# What may be asked of a packed weight. (Not its dtype: inputs that are cast to it become bytes.)
_HARMLESS = {"device"}
_ASKING = {"isinstance", "hasattr", "type", "id"}
_ANY = "*"  # a part of a path that an index chooses
# Neither torch nor what transformers shares between its models knows a layer by name.
_SHARED = (
    "builtins", "torch.", "transformers.distributed.", "transformers.generation.",
    "transformers.modeling_", "transformers.utils.",
)  # fmt: skip
# These run before there are weights, or put one in another's place.
_NOT_FORWARD = ("__init__", "init_", "_init_", "reset_", "tie_", "_tie_", "get_", "set_", "resize_")


class _Read(NamedTuple):
    """`self.a[0].b.weight` is read: ``path`` is `a.*.b`, and ``own`` whether it begins at `self`.

    ``conditions`` have to hold for it, so far as they are about `self` alone.
    """

    path: str
    own: bool
    conditions: tuple[str, ...]


def read_directly(model: Any, linear: Iterable[str]) -> set[str]:
    """Those of the ``linear`` modules (paths) whose `.weight` the model's own code reads.

    A read that the settings of this model rule out does not count, such as BLOOM's for
    tensor-parallel pretraining.
    """
    found: set[str] = set()
    names = list(linear)
    for path, module in model.named_modules():
        for read in _reads(type(module)):
            inside = [name for name in names if not path or name.startswith(f"{path}.")]
            hit = {name for name in inside if _is_read(name[len(path) :].lstrip("."), read)}
            if hit and all(_may_hold(each, module) for each in read.conditions):
                found |= hit
    return found


def _is_read(name: str, read: _Read) -> bool:
    parts, wanted = name.split("."), read.path.split(".")
    if not read.own:  # of which module it is read is not known
        parts = parts[-len(wanted) :]
    return len(parts) == len(wanted) and all(
        part == each or each == _ANY for part, each in zip(parts, wanted, strict=True)
    )


def _reads(kind: type) -> tuple[_Read, ...]:
    """All such reads in the methods of a class and of those that it inherits from."""
    found: set[_Read] = set()
    for each in kind.__mro__:
        if not each.__module__.startswith(_SHARED):
            found |= _classes(each.__module__).get(each.__name__, frozenset())
    return tuple(sorted(found))


@cache
def _classes(module: str) -> dict[str, frozenset[_Read]]:
    """The reads of each class in a module's file."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, SyntaxError, KeyError):  # made without a file
        return {}
    return {
        node.name: frozenset(
            read
            for method in node.body
            if isinstance(method, ast.FunctionDef) and not method.name.startswith(_NOT_FORWARD)
            for read in _in_method(method, (), _aliases(method))
        )
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def _aliases(method: ast.FunctionDef) -> dict[str, list[str]]:
    """What names stand for: `a = self.b`, and one after the other of `for a in self.b`."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(method):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, chain = node.targets[0], _chain(node.value, found)
        elif isinstance(node, ast.For):
            target, chain = node.target, _chain(node.iter, found)
            chain = chain and [*chain, _ANY]
        else:
            continue
        if isinstance(target, ast.Name) and chain and chain[0] == "self":
            found[target.id] = chain
    return found


def _chain(node: ast.AST, aliases: Mapping[str, list[str]]) -> list[str] | None:
    """`self.a[0].b` as self, a, *, b; None of anything else."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, [node.id])
    if not isinstance(node, ast.Attribute | ast.Subscript):
        return None
    before = _chain(node.value, aliases)
    return before and [*before, node.attr if isinstance(node, ast.Attribute) else _ANY]


def _in_method(
    node: ast.AST, conditions: tuple[str, ...], aliases: Mapping[str, list[str]]
) -> Iterator[_Read]:
    if isinstance(node, ast.If | ast.IfExp):
        test = ast.unparse(node.test)
        yield from _in_method(node.test, conditions, aliases)
        for part, condition in ((node.body, test), (node.orelse, f"not ({test})")):
            for each in part if isinstance(part, list) else [part]:
                yield from _in_method(each, (*conditions, condition), aliases)
        return
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKING:
        return
    if isinstance(node, ast.Attribute):
        if node.attr in _HARMLESS and _is_weight(node.value):
            return
        if _is_weight(node) and (chain := _chain(node.value, aliases)) is not None:
            own = chain[0] == "self"
            if len(chain) > 1 and (own or chain[-1] != _ANY):  # else it could be any layer at all
                yield _Read(".".join(chain[1:]), own, conditions)
            return
    for child in ast.iter_child_nodes(node):
        yield from _in_method(child, conditions, aliases)


def _is_weight(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "weight"


def _may_hold(condition: str, module: Any) -> bool:
    """False where a condition on settings of ``module`` alone does not hold.

    Only names, numbers and comparisons are looked at: nothing is called. `self.training` may be
    either.
    """
    tree = ast.parse(condition, mode="eval")
    plain: tuple[type[ast.AST], ...] = (ast.Expression, ast.Attribute, ast.Name, ast.Constant)
    plain += (ast.Load, ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop)
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    asks_mode = any(isinstance(node, ast.Attribute) and node.attr == "training" for node in nodes)
    if names != {"self"} or asks_mode or not all(isinstance(node, plain) for node in nodes):
        return True
    try:
        return bool(
            eval(compile(tree, "<condition>", "eval"), {"__builtins__": {}}, {"self": module})
        )
    except Exception:  # whatever an attribute that is not there, or no number, raises
        return True
