"""Reads of a layer's weight past the layer, found in the source of a class however they are put."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loftq_cli.models.raw_weights import read_directly


class Reads(nn.Module):
    """Each layer is called like what is done with it."""

    def __init__(self, **settings: bool) -> None:
        super().__init__()
        for name in ("plain", "renamed", "called", "asked", "never", "perhaps", "cast"):
            setattr(self, name, nn.Linear(4, 4))
        self.listed = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.blocks = nn.ModuleList(nn.ModuleDict({"inner": nn.Linear(4, 4)}) for _ in range(2))
        self.settings = settings
        self.off, self.on = False, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x, self.plain.weight)
        layer = self.renamed
        x = F.linear(x, layer.weight)
        x = self.called(x)
        if isinstance(self.asked.weight, torch.Tensor):
            x = x.to(self.asked.weight.device)
        if self.off and self.on:
            x = F.linear(x, self.never.weight)
        elif self.settings["a call or an index is not looked into"]:
            x = F.linear(x, self.perhaps.weight)
        for each in self.listed:
            x = F.linear(x, each.weight)
        x = F.linear(x, self.blocks[0].inner.weight)  # type: ignore[union-attr, arg-type]
        return x.to(self.cast.weight.dtype)

    def forget(self, others: list[nn.Linear]) -> None:
        del others[0].weight  # of whom nothing is known: not all layers of the model


@pytest.mark.parametrize("inside", ["", "model.layers.0"])
def test_which_weights_are_read(inside: str) -> None:
    model: nn.Module = Reads()
    for part in reversed(inside.split(".") if inside else []):
        model = nn.ModuleDict({part: model})
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    expected = {
        *("plain", "renamed", "perhaps", "cast", "listed.0", "listed.1"),
        *("blocks.0.inner", "blocks.1.inner"),
    }
    before = f"{inside}." if inside else ""
    assert read_directly(model, linear) == {f"{before}{name}" for name in expected}
