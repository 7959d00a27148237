"""`python -m distill`: see distill/cli.py."""

import sys

from distill.cli import main

if __name__ == "__main__":
    sys.exit(main())
