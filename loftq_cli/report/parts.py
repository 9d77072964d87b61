"""What the views of several commands have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loftq_cli.report.tables import Column, Table
from loftq_cli.schema import Document


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


def one_record(title: str, data: Mapping[str, Any]) -> Table:
    """A result that is one line of values."""
    return Table(title, [Column(key, key) for key in data], [list(data.values())])
