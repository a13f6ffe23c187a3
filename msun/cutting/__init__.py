"""Where a network can be cut, and its two halves."""
