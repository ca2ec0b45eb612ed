"""`einlinear report`."""

from pathlib import Path


def report(folders: list[Path]) -> None:
    """Placeholder."""
