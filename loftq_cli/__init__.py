"""Quantize any Hugging Face checkpoint and compute the LoftQ start for its LoRA adapters."""

__version__ = "0.1.0"
