"""From a model's name to its files, its linear layers, and the libraries that load it."""
