"""One file a subcommand: options in, result document out; heavy imports inside functions."""
