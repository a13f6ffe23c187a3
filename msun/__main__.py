"""`python -m msun` is the command line."""

import sys


def entry() -> int:
    """Load the command line and run it."""
    from msun.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(entry())
