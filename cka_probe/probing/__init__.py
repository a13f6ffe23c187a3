"""One probe from options to report."""
