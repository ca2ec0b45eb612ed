"""`python -m einlinear`."""

from einlinear.cli import main

main()
