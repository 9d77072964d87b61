"""The numerics: tensors in, tensors out. Nothing here prints or opens a file."""
