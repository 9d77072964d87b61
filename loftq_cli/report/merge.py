"""What `merge` wrote: the result for a person, and the README of the merged model."""

from __future__ import annotations

from loftq_cli.report import units
from loftq_cli.report.escape import code_span
from loftq_cli.report.loading import auto_class, quoted
from loftq_cli.report.parts import model_name
from loftq_cli.report.tables import Facts, Records, View
from loftq_cli.schema import Document, MergeResults, QuantizeResults


def merge_view(document: Document[MergeResults]) -> View:
    results = document.results
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
corrected: to have the memory of the quantized model, serve that with its adapter instead.
"""
