"""`python -m cka_probe` is the command line."""

import sys

from cka_probe.interrupts import told


def entry() -> int:
    """Load the command line and run it."""
    with told():
        from cka_probe.cli import main
    return main()


if __name__ == "__main__":
    sys.exit(entry())
