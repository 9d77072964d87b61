"""`loftq load`: really loads a model and tokenizer, and says what that took."""

from __future__ import annotations

from collections import Counter

from loftq_cli.commands.options import Device, Dtype, Model
from loftq_cli.commands.run import Run, command


@command("load")
def load(run: Run, model: Model = "demo", device: Device = "auto", dtype: Dtype = "auto") -> None:
    """Load a model and its tokenizer, and say what that took.

    Example: loftq load --model OUT
    """
    import time

    from loftq_cli import hardware
    from loftq_cli.commands.loaded import load_for_run
    from loftq_cli.models.loading import logical_parameters
    from loftq_cli.schema import LoadResults

    began = time.perf_counter()
    resolved, loaded, where = load_for_run(run, model, device, dtype)
    seconds = time.perf_counter() - began
    network = loaded.model
    base = network.get_base_model() if loaded.adapter else network
    by_dtype: Counter[str] = Counter()
    for parameter in network.parameters():
        by_dtype[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
    adapter_parameters = sum(
        parameter.numel() for name, parameter in network.named_parameters() if ".lora_" in name
    )
    quantization = getattr(base.config, "quantization_config", None)
    run.finish(
        LoadResults(
            architecture=type(base).__name__,
            parameters=logical_parameters(network) - adapter_parameters,
            parameter_bytes=sum(by_dtype.values()),
            bytes_by_dtype=dict(sorted(by_dtype.items())),
            load_seconds=seconds,
            peak_memory_bytes=hardware.peak_memory_bytes(),
            device=where.device,
            dtype=where.dtype,
            quantization=None if quantization is None else str(quantization.quant_method.value),
            quantized_layers=sum(
                type(module).__name__ in ("Linear4bit", "Linear8bitLt")
                for module in base.modules()
                if not hasattr(module, "base_layer")
            ),
            adapter=loaded.adapter,
            adapter_parameters=adapter_parameters,
            tokenizer=None if loaded.tokenizer is None else type(loaded.tokenizer).__name__,
            vocabulary_size=None if loaded.tokenizer is None else len(loaded.tokenizer),
        ),
        model=resolved,
    )
