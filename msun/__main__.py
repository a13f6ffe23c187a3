"""`python -m msun` is the command line."""

import sys

from cka_probe.interrupts import told


def entry() -> int:
    """Load the command line and run it."""
    with told():
        from msun.cli import main
    return main()


if __name__ == "__main__":
    sys.exit(entry())
