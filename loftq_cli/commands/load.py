"""`loftq load`: really loads a model and tokenizer, and says what that took."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Literal

from loftq_cli.commands.run import Run, command
from loftq_cli.commands.spellings import option
from loftq_cli.containers import holds_codes
from loftq_cli.errors import CheckFailed

if TYPE_CHECKING:
    from loftq_cli.commands.loaded import Where
    from loftq_cli.models.loading import LoadedModel
    from loftq_cli.schema import LoadResults, ModelIdentity

# What `load_seconds` is the sum of. Importing the libraries is told apart from it: that is the
# same for every model.
_STEPS = ("resolve", "build", "read")


@command(
    "load",
    expect=option(
        Literal["cpu", "cuda"] | None,
        "--expect",
        metavar="cpu|cuda",
        help="Exit 3 if the model ends up anywhere else.",
    ),
    random_weights=option(
        bool,
        "--random-weights",
        help="Build the architecture from its config alone; no weights are needed.",
    ),
)
def load(
    run: Run,
    model: str = "demo",
    device: str = "auto",
    dtype: str = "auto",
    expect: str | None = None,
    random_weights: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """
    \b
    loftq load --model org/name
    loftq load --model OUT --expect cuda && python train.py
    loftq load --model gpt2 --random-weights         (no network, no weights)

    Loads the weights and the tokenizer for real, with the adapter if one lies beside them, and
    says what that took: parameters, bytes, seconds, memory, and why on this device.
    """
    from loftq_cli.commands.loaded import load_for_run

    begin = _build if random_weights else load_for_run
    identity, loaded, where = begin(run, model, device, dtype, trust_remote_code=trust_remote_code)
    run.finish(_results(loaded, where, run.seconds(*_STEPS), random_weights), model=identity)
    if expect is not None and where.device.partition(":")[0] != expect:
        raise CheckFailed(
            f"expected {expect}, and the model is on {where.device}",
            cause=where.reason,
        )


def _build(
    run: Run, spec: str, device: str, dtype: str, *, trust_remote_code: bool
) -> tuple[ModelIdentity, LoadedModel, Where]:
    """The model of a config, or of the shipped table, with random weights."""
    from loftq_cli.commands.loaded import choose, timed
    from loftq_cli.models.known import known_model
    from loftq_cli.models.random_weights import random_model
    from loftq_cli.models.source import read_config
    from loftq_cli.models.spec import local_model, resolve_model
    from loftq_cli.schema import ModelIdentity

    with timed(run, "resolve"):
        found = local_model(spec)
        # The table comes before the hub: this is for boxes without a network.
        if found is None and known_model(spec) is None:
            found = resolve_model(spec, with_code=trust_remote_code, with_weights=False)
    directory = None if found is None else found.directory
    with timed(run, "import"):
        where = choose(run, {} if directory is None else read_config(directory), device, dtype)
    loaded = random_model(
        directory,
        spec,
        device=where.device,
        dtype=where.dtype,
        trust_remote_code=trust_remote_code,
        clock=partial(timed, run),
    )
    identity = ModelIdentity(id=spec, source="known") if found is None else found.identity
    return identity, loaded, where


def _results(
    loaded: LoadedModel, where: Where, seconds: float, random_weights: bool
) -> LoadResults:
    from loftq_cli import hardware
    from loftq_cli.models.loading import logical_parameters
    from loftq_cli.schema import LoadResults

    by_dtype: Counter[str] = Counter()
    for parameter in loaded.model.parameters():
        by_dtype[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
    adapter_parameters = sum(
        parameter.numel()
        for name, parameter in loaded.model.named_parameters()
        if ".lora_" in name or ".modules_to_save." in name
    )
    quantization = getattr(loaded.base.config, "quantization_config", None)
    method = None if quantization is None else str(quantization.quant_method.value)
    layers = sum(
        holds_codes(module) for module in loaded.base.modules() if not hasattr(module, "base_layer")
    )
    if loaded.experts is not None:
        layers += loaded.experts.matrices
    if (codes := loaded.codes) is not None:
        method, layers = codes.container.name, len(codes.weights)
    tokenizer = loaded.tokenizer
    return LoadResults(
        architecture=type(loaded.base).__name__,
        parameters=logical_parameters(loaded.model) - adapter_parameters,
        parameter_bytes=sum(by_dtype.values()),
        bytes_by_dtype=dict(sorted(by_dtype.items())),
        load_seconds=seconds,
        peak_memory_bytes=hardware.peak_memory_bytes(),
        peak_device_memory_bytes=hardware.peak_device_memory_bytes(where.device),
        device=where.device,
        dtype=where.dtype,
        quantization=method,
        quantized_layers=layers,
        dequantized=codes is not None,
        adapter=loaded.adapter,
        adapter_parameters=adapter_parameters,
        tokenizer=None if tokenizer is None else type(tokenizer).__name__,
        vocabulary_size=None if tokenizer is None else len(tokenizer),
        random_weights=random_weights,
    )
