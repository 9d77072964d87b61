"""What the views, findings and recommendations of several commands have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from loftq_cli.schema import Document, Remark

# What said which tensors are layers.
TOLD_BY = {
    "names": "names and shapes only: the model class was not asked (--preflight asks it)",
    "class": "the model class, the library that loads it, and PEFT",
}


def model_name(document: Document[Any]) -> str:
    """The model as its user would type it, with the revision that it came to."""
    model = document.model
    if model is None:
        return "the model"
    return model.id if model.revision is None else f"{model.id} ({model.revision})"


def choice(document: Document[Any], name: str, value: str) -> tuple[str, str]:
    """A value with the reason for it, where it was chosen."""
    resolved = document.resolved.get(name)
    return (name, value if resolved is None else f"{value} ({resolved.reason})")


def remark(document: Document[Any], text: str) -> Remark:
    """One sentence about a document."""
    model = None if document.model is None else document.model.id
    return Remark(command=document.command, model=model, text=text)


Rules: TypeAlias = Mapping[str, Callable[[Document[Any]], Iterable[str]]]


def remarks(documents: Iterable[Document[Any]], rules: Rules) -> list[Remark]:
    """What the rules for its command say of each document."""
    return [
        remark(document, text)
        for document in documents
        if document.command in rules
        for text in rules[document.command](document)
    ]
