"""Text, Markdown and JSON from result documents; nothing here knows tensors or files."""
