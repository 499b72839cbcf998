"""`python -m safeopt` is the `safeopt` command."""

import sys

from safeopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
