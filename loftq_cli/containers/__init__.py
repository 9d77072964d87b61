"""How weights lie in files: a container a file, and what they have in common."""
