"""What every model of a document is made from."""

from __future__ import annotations

from typing import TypeAlias

from pydantic import BaseModel, ConfigDict

Scalar: TypeAlias = str | int | float | bool | None


class Model(BaseModel):
    # `protected_namespaces` would claim every field that starts with "model".
    model_config = ConfigDict(
        allow_inf_nan=False, extra="ignore", frozen=True, protected_namespaces=()
    )
