"""The envelope that every command's results come in, and what all models here are made from."""

from __future__ import annotations

from typing import Generic, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = "1.0"
Scalar: TypeAlias = str | int | float | bool | None


class Model(BaseModel):
    # `protected_namespaces` would claim every field that starts with "model".
    model_config = ConfigDict(
        allow_inf_nan=False, extra="ignore", frozen=True, protected_namespaces=()
    )


class Tool(Model):
    name: str
    version: str


class ModelIdentity(Model):
    """Which weights: `id` as the user would type it, `revision` the resolved commit if any."""

    id: str
    revision: str | None = None
    source: Literal["demo", "directory", "hub", "known"]


class Resolved(Model):
    """What an `auto` became, and why."""

    value: Scalar
    reason: str


class Accelerator(Model):
    name: str
    memory_bytes: int


class Environment(Model):
    python: str
    platform: str
    machine: str
    cpu_count: int
    memory_bytes: int | None
    packages: dict[str, str]
    # Empty also where torch was never imported: a torch-free command does not look.
    accelerators: list[Accelerator] = []


Results = TypeVar("Results", bound=BaseModel)


class Document(Model, Generic[Results]):
    # `schema` itself is taken: BaseModel has a method of that name.
    schema_name: str = Field(alias="schema")
    schema_version: str = SCHEMA_VERSION
    tool: Tool
    argv: list[str]
    model: ModelIdentity | None = None
    resolved: dict[str, Resolved] = {}
    environment: Environment
    results: Results
    warnings: list[str] = []
    timings_seconds: dict[str, float] = {}

    @property
    def command(self) -> str:
        return self.schema_name.removeprefix("loftq/")
