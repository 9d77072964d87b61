"""What `generate` wrote, prompt by prompt, and how fast."""

from __future__ import annotations

from loftq_cli.report import units
from loftq_cli.report.parts import choice, model_name
from loftq_cli.report.tables import Facts, Passage, Records, Section, View
from loftq_cli.schema import Document, GenerateResults, Generation


def generate_view(document: Document[GenerateResults]) -> View:
    results = document.results
    sections: list[Section] = [
        Passage(
            f"› {each.prompt}",
            each.generated_text,
            f"{units.plural(each.new_tokens, 'token')} in {units.seconds(each.seconds)}, "
            f"{units.significant(each.tokens_per_second)} tokens/s",
        )
        for each in results.generations
    ]
    facts = [
        choice(document, "device", results.device),
        choice(document, "dtype", results.dtype),
    ]
    if results.adapter is not None:
        facts.insert(0, ("adapter", results.adapter))
    if results.temperature is not None:
        top_p = results.top_p
        tail = f", top-p {top_p:g}" if top_p is not None and top_p < 1 else ""
        sampled = f"temperature {results.temperature:g}{tail}, seed {results.seed}"
        facts.append(("sampled", sampled))
    if len(results.generations) > 1:
        rate = units.significant(results.average_tokens_per_second)
        facts.append(("average", f"{units.seconds(results.average_seconds)}, {rate} tokens/s"))
    records = Records.of(results.generations, list(Generation.model_fields))
    return View(f"Generated with {model_name(document)}", [*sections, Facts(facts)], records)
