"""What `merge` wrote: the result for a person, and the README of the merged model."""

from __future__ import annotations

from pathlib import PurePath

from loftq_cli.report import units
from loftq_cli.report.escape import code_span
from loftq_cli.report.formats import number_type
from loftq_cli.report.loading import (
    auto_class,
    can_take_adapter,
    here_as_text,
    here_lines,
    keeping_layout,
    load_lines,
    own_experts,
    python_block,
    quoted,
    why_not_by_transformers,
)
from loftq_cli.report.parts import model_name
from loftq_cli.report.sparks import bar
from loftq_cli.report.tables import Column, Facts, Records, Table, View
from loftq_cli.schema import Document, MergedFrom, MergeResults, QuantizeResults, Requantized

_WORST = 5  # layers that are named


def merge_view(document: Document[MergeResults]) -> View:
    results = document.results
    if (again := results.requantized) is not None:
        return _requantized_view(document, again)
    layers = units.plural(results.quantized_layers, "quantized layer")
    checked = units.plural(results.checked_layers, "layer")
    deviation = units.percent(results.output_deviation)
    facts = [
        ("made from", model_name(document)),
        ("adapter", results.adapter),
        ("layers", f"{layers} dequantized, {units.number(results.merged_layers)} of them merged"),
        *([("replaced", ", ".join(results.replaced))] if results.replaced else []),
        ("model", f"{units.size(results.input_bytes)} → {units.size(results.output_bytes)}"),
        ("checked", f"{checked} read back: outputs within {deviation} of the adapted ones"),
        ("files", units.number(len(results.files))),
        ("time", units.seconds(results.seconds)),
    ]
    title = f"Wrote {results.output}: {results.source} with its adapter merged, in {results.dtype}"
    return View(title, [Facts(facts)], Records.of(results.files, ("name", "bytes", "sha256")))


def _requantized_view(document: Document[MergeResults], again: Requantized) -> View:
    results = document.results
    layers = units.plural(results.quantized_layers, "layer")
    loss = units.percent(again.weight_error_relative)
    sizes = f"{units.size(results.input_bytes)} → {units.size(results.output_bytes)}"
    facts = [
        ("made from", model_name(document)),
        ("adapter", f"{results.adapter}, in {units.number(results.merged_layers)} of {layers}"),
        *([("replaced", ", ".join(results.replaced))] if results.replaced else []),
        ("weights", f"{sizes}, {units.plain(again.stored_bits)} bits a quantized one"),
        ("cost", f"{loss} weight error by quantizing again, measured in the files"),
        ("outputs", f"within {units.percent(results.output_deviation)} of the adapted layers'"),
        ("holds", "no adapter: it is in the weights"),
        ("files", units.number(len(results.files))),
        ("time", units.seconds(results.seconds)),
    ]
    title = (
        f"Wrote {results.output}: {results.source} with its adapter merged, in {again.container} "
        "again"
    )
    worst = max(again.layers, key=lambda layer: layer.weight_error_relative).weight_error_relative
    ordered = sorted(again.layers, key=lambda layer: -layer.weight_error_relative)
    columns = [
        Column("name", "layer", "name"),
        Column("bits", "bits"),
        Column("weight_error_relative", "weight error", show=units.percent),
        Column(lambda layer: layer.weight_error_relative / (worst or 1.0), "", "picture", bar),
    ]
    table = Table("Layers with the most error", columns, ordered[:_WORST])
    keys = ("name", "shape", "bits", "weight_error_relative")
    return View(title, [Facts(facts), table], Records.of(again.layers, keys))


def requantized_card(results: QuantizeResults, merged: MergedFrom, here: str) -> str:
    """The README of a merged model that was quantized again; ``here`` is the directory's name."""
    source, adapter = (PurePath(each).name for each in (merged.source, merged.adapter))
    loss = units.percent(results.totals.weight_error_relative or 0.0)
    lines = [
        *here_lines(results),
        *load_lines(results, "here", here_as_text(results)),
        *keeping_layout(results, "model"),
    ]
    load = python_block("\n".join(lines))
    if not can_take_adapter(results):
        reads = "`loftq generate` loads it" if own_experts(results) else "vLLM serves it"
        load = f"{reads}; transformers does not load it: {why_not_by_transformers(results)}."
    return f"""\
# A merged model, quantized again

{code_span(here)} is the quantized model {code_span(source)} with the trained adapter
{code_span(adapter)} in its weights, in {number_type(results)}. There is no adapter beside it:
`loftq merge --requantize` wrote it. Quantizing changed the merged weights by {loss}, relative, in
the Frobenius norm; `loftq_report.json` has the figure of every layer.

## Load

{load}

Put the adapter on it no second time. A new one can be trained on it like on any quantized model.
"""


def merged_card(base: QuantizeResults, name: str, adapter: str, dtype: str) -> str:
    """The README of a merged model.

    Args:
        base: what was quantized.
        name: of the directory.
        adapter: that of the adapter's.
        dtype: torch's name of that of the weights.
    """
    own_code = ", trust_remote_code=True" if base.own_code else ""
    kind = auto_class(base)
    return f"""\
# A merged model

The adapter {code_span(adapter)} in the weights that it was trained on: those of a quantized model,
dequantized, in {dtype}. `loftq merge` wrote it. It is an ordinary model without quantization, and
whatever loads the original architecture loads it:

```python
from transformers import {kind}

model = {kind}.from_pretrained({quoted(name)}{own_code})
```

Put the adapter on it no second time. Quantized again, it loses a part of what the adapter
corrected, and `loftq merge --requantize` says how much; to have the memory of the quantized model
without that, serve it with its adapter.
"""
