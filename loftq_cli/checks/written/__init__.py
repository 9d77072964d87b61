"""Proves what a `quantize` run wrote, from its files alone and through the libraries."""
