"""scikit-learn's digits, which need no file."""

from __future__ import annotations

import torch

from einlinear_lab.data.images.dataset import Images
from einlinear_lab.data.images.split import stratified_split


def read_digits(test_fraction: float) -> Images:
    """Return 1,797 grey images of 8 x 8 pixels, part of scikit-learn's installation."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    y = torch.from_numpy(labels).long()
    classes = tuple(str(digit) for digit in range(10))
    source = "scikit-learn's digits, part of its installation"
    train, test = stratified_split(y, classes, test_fraction)
    return Images("digits", source, x[train], y[train], x[test], y[test], classes)
