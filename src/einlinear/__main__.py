"""`python -m einlinear`."""

from einlinear_cli import main

main()
