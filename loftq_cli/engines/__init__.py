"""The plan of a `quantize` run, and its tasks run in this process."""
