"""Quantize any Hugging Face checkpoint and compute the LoftQ start for its LoRA adapters."""

__version__ = "0.1.0"

from loftq_cli.api import load, quantize, verify

__all__ = ["__version__", "load", "quantize", "verify"]
