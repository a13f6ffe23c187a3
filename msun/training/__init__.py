"""Training a multi-scale network."""
