"""`python -m cka_probe` is the command line."""

import sys

from cka_probe.cli import main

if __name__ == "__main__":
    sys.exit(main())
