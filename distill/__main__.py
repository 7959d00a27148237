"""`python -m distill`: see distill/cli.py."""

from distill.cli import main
from distill.launch import leave

if __name__ == "__main__":
    leave(main())
