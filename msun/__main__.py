"""`python -m msun` is the command line."""

import sys

from msun.cli import main

if __name__ == "__main__":
    sys.exit(main())
