"""Files: safetensors headers and indexes, streamed reading, staged writing."""
