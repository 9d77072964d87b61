"""What `load` loaded, and what that took."""

from __future__ import annotations

from loftq_cli.report import units
from loftq_cli.report.parts import choice, model_name
from loftq_cli.report.tables import Facts, Records, View
from loftq_cli.schema import Document, LoadResults

_STEPS = ("resolve", "build", "read")


def load_view(document: Document[LoadResults]) -> View:
    results = document.results
    by_dtype = ", ".join(
        f"{units.size(count)} {dtype}" for dtype, count in results.bytes_by_dtype.items()
    )
    random = " with random weights" if results.random_weights else ""
    facts = [
        ("architecture", f"{results.architecture}{random}"),
        ("parameters", f"{units.number(results.parameters)} in {by_dtype}"),
    ]
    if results.quantization is not None:
        layers = units.plural(results.quantized_layers, "quantized layer")
        how = ", dequantized on loading" if results.dequantized else ""
        facts.append(("quantization", f"{results.quantization}, {layers}{how}"))
    if results.adapter is not None:
        count = units.number(results.adapter_parameters)
        facts.append(("adapter", f"{results.adapter}, {count} parameters"))
    if results.tokenizer is not None:
        size = results.vocabulary_size
        tokens = f", {units.number(size)} tokens" if size is not None else ""
        facts.append(("tokenizer", f"{results.tokenizer}{tokens}"))
    memory = units.size(results.peak_memory_bytes)
    if results.peak_device_memory_bytes is not None:
        memory += f", and {units.size(results.peak_device_memory_bytes)} on {results.device}"
    facts += [
        choice(document, "device", results.device),
        choice(document, "dtype", results.dtype),
        ("time", _seconds(document)),
        ("peak memory", memory),
    ]
    data = results.model_dump()
    data["bytes_by_dtype"] = [f"{key}={value}" for key, value in results.bytes_by_dtype.items()]
    records = Records(list(data), [list(data.values())])
    return View(f"Loaded {model_name(document)}", [Facts(facts)], records)


def _seconds(document: Document[LoadResults]) -> str:
    """0.4 s (resolve 1 ms, build 0.1 s, read 0.3 s), after 3.2 s of importing libraries"""
    timings = document.timings_seconds
    parts = [f"{step} {units.seconds(timings[step])}" for step in _STEPS if step in timings]
    text = units.seconds(document.results.load_seconds)
    if parts:
        text += f" ({', '.join(parts)})"
    if "import" in timings:
        text += f", after {units.seconds(timings['import'])} of importing libraries"
    return text
