"""A network's layers: which to tap, hooks that collect them, reducers, MACs."""
