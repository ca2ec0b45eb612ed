"""Loading of images by the name of a data set."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from einlinear.structures.families import did_you_mean
from einlinear_lab.data.images.cifar import read_cifar
from einlinear_lab.data.images.dataset import Images, resize, stratified_split
from einlinear_lab.data.images.fashion_mnist import read_fashion_mnist
from einlinear_lab.data.images.folder import read_folder

NAMES = ("auto", "fashion-mnist", "digits")


def load_images(
    data: str | Path = "auto",
    image_size: int | None = None,
    test_fraction: float = 0.2,
    limit: int | None = None,
    skip_broken: bool = False,
) -> Images:
    """Load images for classification into memory.

    Args:
        data: one of

            * "fashion-mnist": what tools/fetch_fashion_mnist.sh put into $EINLINEAR_DATA (by default
              ~/.cache/einlinear), or the installed Debian package, or else a download;
            * "digits": scikit-learn's 8 x 8 digits, which need no file;
            * "auto": Fashion-MNIST where it can be had, else the digits; `source` says which and why;
            * a folder with the binary version of CIFAR-10 (data_batch_1.bin to data_batch_5.bin, test_batch.bin) or of
              CIFAR-100 (train.bin, test.bin);
            * a folder with one subfolder of images per class, or with train/ and test/ that hold such subfolders. Grey
              if all images are grey, else RGB. Files are BMP, GIF, JPEG, PNG, PPM, TIFF or WebP, of at most 80 million
              pixels.
        image_size: resize to image_size x image_size pixels (bilinear, antialiased). Default: as they are.
        test_fraction: share of each class held out for testing, where the data has no test set of its own.
        limit: keep at most this many training images, the classes as balanced as they can be. Default: all.
        skip_broken: leave out the files of a folder that cannot be read; `Images.skipped` has their names. Otherwise
            they are an error that lists them.

    Returns:
        Images, the same ones in the same order every time.

    Raises:
        ValueError: an unknown name or a bad argument; a folder without classes or images; an image that cannot be read,
            differs in size or has NaN or infinite pixels; a corrupt data file.
        FileNotFoundError: the folder does not exist, or Fashion-MNIST was asked for and cannot be had.

    Example:
        >>> from einlinear_lab.data import load_images
        >>> images = load_images("digits", limit=100)
        >>> images.train_x.shape, len(images.classes)
        (torch.Size([100, 1, 8, 8]), 10)
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size}: it must be at least 1 pixel")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction}: it must lie between 0 and 1, exclusive")
    images = _read(data, image_size, test_fraction, skip_broken)
    for split, x in (("training", images.train_x), ("test", images.test_x)):
        # (N, C H W)
        bad = ~x.isfinite().flatten(1)
        if bad.any():
            where = f"{int(bad.sum())} pixels of {int(bad.any(1).sum())} {split} images"
            raise ValueError(f"{images.name}: {where} are NaN or infinite; all pixels must be finite")
    return _standardised(images if limit is None else _limited(images, limit))


def _read(data: str | Path, image_size: int | None, test_fraction: float, skip_broken: bool) -> Images:
    path = Path(data).expanduser()
    if data == "auto":
        try:
            images = read_fashion_mnist()
        except FileNotFoundError:
            reason = "Fashion-MNIST is neither on this machine nor can it be downloaded"
            images = replace(_read_digits(test_fraction), source=f"scikit-learn's digits, since {reason}")
    elif data == "fashion-mnist":
        images = read_fashion_mnist()
    elif data == "digits":
        images = _read_digits(test_fraction)
    # Path("") is the current folder.
    elif str(data) and path.exists():
        cifar = read_cifar(path)
        if cifar is None:
            return read_folder(path, image_size, test_fraction, skip_broken)
        images = cifar
    # A separator shows that a path is meant.
    elif path.name != str(data):
        raise FileNotFoundError(
            f"{path} does not exist; give a folder with one subfolder of images per class, or with CIFAR's .bin files"
        )
    else:
        hint = did_you_mean(str(data).lower(), NAMES, cutoff=0.5)
        raise ValueError(f"unknown data {str(data)!r}.{hint} Give one of {', '.join(NAMES)}, or an existing folder")
    if image_size is None:
        return images
    return replace(images, train_x=resize(images.train_x, image_size), test_x=resize(images.test_x, image_size))


def _read_digits(test_fraction: float) -> Images:
    """Return 1,797 grey images of 8 x 8 pixels, part of scikit-learn's installation."""
    # read from its file, as the import of scikit-learn takes seconds
    package = find_spec("sklearn")
    if package is None or package.submodule_search_locations is None:
        raise ModuleNotFoundError(
            "the digits are part of scikit-learn, which is not installed: pip install scikit-learn"
        )
    file = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    table = torch.from_numpy(np.loadtxt(file, delimiter=","))
    x, y = table[:, :-1].float().view(-1, 1, 8, 8) / 16, table[:, -1].long()
    classes = tuple(map(str, range(10)))
    train, test = stratified_split(y, classes, test_fraction)
    source = "scikit-learn's digits, part of its installation"
    return Images("digits", source, x[train], y[train], x[test], y[test], classes)


def _limited(images: Images, limit: int) -> Images:
    """Keep the first `limit` training images, taken from each class in turn."""
    classes = len(images.classes)
    if limit < classes:
        raise ValueError(f"limit={limit}: fewer training images than the {classes} classes of {images.name}")
    # 1 for the first image of its class, 2 for the second, ...
    turn = F.one_hot(images.train_y).cumsum(0).gather(1, images.train_y[:, None]).flatten()
    keep = turn.argsort(stable=True)[:limit].sort().values
    return replace(images, train_x=images.train_x[keep], train_y=images.train_y[keep])


def _standardised(images: Images) -> Images:
    std, mean = torch.std_mean(images.train_x, dim=(0, 2, 3), keepdim=True, correction=0)
    # A channel without contrast becomes all zeros.
    std = torch.where(std > 0, std, 1.0)
    return replace(images, train_x=(images.train_x - mean) / std, test_x=(images.test_x - mean) / std)
