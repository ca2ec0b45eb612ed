"""Images for classification, held in memory: Fashion-MNIST, scikit-learn's digits or a user's folder.

Shapes: N images in a split, B in a batch, C channels, H x W pixels.
"""

from __future__ import annotations

import difflib
import gzip
import logging
import math
import os
import shutil
import socket
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

logger = logging.getLogger(__name__)

NAMES = ("auto", "fashion-mnist", "digits")
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_FASHION_FILES = tuple(
    f"{split}-{content}-ubyte.gz" for split in ("train", "t10k") for content in ("images-idx3", "labels-idx1")
)
_FASHION_SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package installs
_DOWNLOAD_TIMEOUT = 5.0  # seconds without an answer or a byte
_IDX_BYTES = 0x0800  # idx magic number of unsigned bytes; the number of axes is added to it


@dataclass(frozen=True, eq=False)
class Images:
    """A classification data set: training and test images with their labels.

    Attributes:
        name: "fashion-mnist", "digits" or the folder's name.
        source: one sentence that says where the images came from.
        train_x, test_x: (N, C, H, W) float32, standardised with the training set's mean and standard
            deviation per channel.
        train_y, test_y: (N,) int64, indices into classes.
        classes: the names of the classes.
    """

    name: str
    source: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]

    @property
    def channels(self) -> int:
        """C: 1 for grey images, 3 for colour."""
        return self.train_x.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.train_x.shape[2], self.train_x.shape[3]

    @property
    def features(self) -> int:
        """C H W: the width of a flattened image."""
        return math.prod(self.train_x.shape[1:])


def load_images(
    data: str | Path = "auto",
    image_size: int | None = None,
    test_fraction: float = 0.2,
    limit: int | None = None,
) -> Images:
    """Load images for classification into memory.

    Args:
        data: one of

            * "fashion-mnist": what tools/fetch_fashion_mnist.sh put into $EINLINEAR_DATA (by default
              ~/.cache/einlinear), or the installed Debian package, or else a download;
            * "digits": scikit-learn's 8 x 8 digits, which need no file;
            * "auto": Fashion-MNIST where it can be had, else the digits; `source` says which and why;
            * a folder with one subfolder of images per class, or with train/ and test/ that hold such
              subfolders. Grey if all images are grey, else RGB.
        image_size: resize to image_size x image_size pixels (bilinear, antialiased). Default: as they are.
        test_fraction: share of each class held out for testing, where the data has no test set of its own.
        limit: keep at most this many training images, the classes as balanced as they can be. Default: all.

    Returns:
        Images, the same ones in the same order every time.

    Raises:
        ValueError: an unknown name or a bad argument; a folder without classes or images; an image that
            cannot be read, differs in size or has NaN or infinite pixels; a corrupt data file.
        FileNotFoundError: the folder does not exist, or Fashion-MNIST was asked for and cannot be had.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size}: it must be at least 1 pixel")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction}: it must lie between 0 and 1, exclusive")
    images = _read(data, image_size, test_fraction)
    check_finite(images)
    if limit is not None:
        images = _limited(images, limit)
    return _standardised(images)


def check_finite(images: Images, files: Sequence[Path] = ()) -> None:
    """Raise ValueError if any pixel is NaN or infinite, saying how many and in which split.

    Args:
        images: what to check.
        files: the images' files, those of the training images first; the error then names the first bad one.
    """
    starts = {"training": 0, "test": len(images.train_x)}
    for (split, start), x in zip(starts.items(), (images.train_x, images.test_x), strict=True):
        bad = ~x.isfinite().flatten(1)  # (N, C H W)
        if bad.any():
            rows = bad.any(1).nonzero().flatten()
            first = f", first in {files[start + int(rows[0])]}" if files else ""
            raise ValueError(
                f"{images.name}: {int(bad.sum())} pixels of {len(rows)} {split} images are NaN or infinite"
                f"{first}; all pixels must be finite"
            )


def data_dir() -> Path:
    """The folder of fetched data: $EINLINEAR_DATA, or ~/.cache/einlinear where that is unset or empty."""
    return Path(os.environ.get("EINLINEAR_DATA") or "~/.cache/einlinear").expanduser()


def pixel_permutation(features: int, seed: int) -> Tensor:
    """A fixed random order of the input features, (features,) int64: it takes locality away from images."""
    return torch.randperm(features, generator=torch.Generator().manual_seed(seed))


class Augment:
    """Random shifts and flips of a batch of images, and mixup of images and labels.

    Each image is shifted by a whole number of pixels of its own, its edge pixels repeated. The randomness
    comes from the generator that is passed in; the global one is left as it was.

    Args:
        size: (H, W) of the images.
        shift: largest shift, in pixels, in each direction.
        flip: mirror images left to right, each with probability 1/2. Only where a mirrored image keeps its
            class: not for digits.
        mixup: largest share of a second image that `mix` blends in, from 0 (none) to 1.

    Raises:
        ValueError: a negative shift, or mixup outside [0, 1].
    """

    def __init__(self, size: tuple[int, int], *, shift: int = 2, flip: bool = False, mixup: float = 0.0) -> None:
        import kornia.augmentation as K  # takes a second, and only training needs it

        if shift < 0:
            raise ValueError(f"shift={shift}: it must be 0 or more pixels")
        if not 0 <= mixup <= 1:
            raise ValueError(f"mixup={mixup}: it must lie between 0 and 1")
        self.size = tuple(size)
        self.shift = shift
        self.flip = flip
        self.mixup = mixup
        self._steps: list[torch.nn.Module] = []
        if shift:
            self._steps.append(K.RandomCrop(self.size, padding=shift, padding_mode="replicate"))
        if flip:
            self._steps.append(K.RandomHorizontalFlip())
        self._mixup = K.RandomMixUpV2(lambda_val=(0.0, mixup), data_keys=["input", "class"])

    @classmethod
    def suited_to(cls, images: Images, mixup: float = 0.0) -> Augment:
        """Shifts of 2 pixels (1 below 16 x 16), and flips for Fashion-MNIST.

        A user's folder is not flipped: nobody said that its classes survive a mirror.
        """
        shift = 2 if min(images.size) >= 16 else 1
        return cls(images.size, shift=shift, flip=images.name == "fashion-mnist", mixup=mixup)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Shift and flip x, (B, C, H, W) -> the same shape and dtype. x itself is not changed."""
        if x.ndim != 4 or x.shape[2:] != self.size:
            raise ValueError(f"Augment for images of size {self.size} got shape {tuple(x.shape)}")
        with _seeded(generator):
            for step in self._steps:
                x = step(x)
        return x

    def mix(self, x: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Blend each image with another one of the batch, and their labels alike.

        Args:
            x: (B, C, H, W).
            y: (B,) int64 labels below `classes`.
            classes: number of classes.
            generator: where the randomness comes from.

        Returns:
            x of the same shape, and targets (B, classes) float32 whose rows sum to 1, which
            F.cross_entropy takes as they are.
        """
        with _seeded(generator):
            x, labels = self._mixup(x, y)  # labels (B, 3): own label, the other's label, the other's share
        own, other = F.one_hot(labels[:, :2].long(), classes).to(x.dtype).unbind(1)
        return x, torch.lerp(own, other, labels[:, 2:])


def batches(
    images: Images,
    batch_size: int,
    *,
    epochs: int,
    seed: int,
    augment: Augment | None = None,
    permutation: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over shuffled training batches; the same seed gives the same batches.

    The last, partial batch of an epoch is dropped.

    Args:
        images: where to take the training images from.
        batch_size: images in a batch, B.
        epochs: passes over the training images.
        seed: of the shuffling and the augmentation. The global generator is neither read nor changed.
        augment: applied to each batch. Default: none.
        permutation: (features,) order of the flattened pixels, applied last. Default: row-major as they are.

    Returns:
        An iterator over x (B, features) float32 and y, (B,) int64, or (B, classes) float32 with mixup.

    Raises:
        ValueError: a batch_size below 1 or above the number of training images, or a permutation of another
            width.
    """
    count = len(images.train_x)
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size={batch_size}: it must lie between 1 and the {count} training images")
    if permutation is not None and len(permutation) != images.features:
        raise ValueError(f"a permutation of {len(permutation)} for images of {images.features} features")
    return _batches(images, batch_size, epochs, seed, augment, permutation)


def _batches(
    images: Images,
    batch_size: int,
    epochs: int,
    seed: int,
    augment: Augment | None,
    permutation: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(images.train_x), generator=generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            x, y = images.train_x[rows], images.train_y[rows]
            if augment is not None:
                x = augment(x, generator)
                if augment.mixup:
                    x, y = augment.mix(x, y, len(images.classes), generator)
            x = x.flatten(1)
            yield (x if permutation is None else x[:, permutation]), y


@contextmanager
def _seeded(generator: torch.Generator) -> Iterator[None]:
    """Let code that draws from the global CPU generator, as kornia does, draw from `generator` instead."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        yield


def _read(data: str | Path, image_size: int | None, test_fraction: float) -> Images:
    """The images that `data` names, not yet standardised."""
    if data == "digits":
        return _resized(_digits(test_fraction, "scikit-learn's digits, part of its installation"), image_size)
    if data == "fashion-mnist":
        return _resized(_fashion_mnist(), image_size)
    if data == "auto":
        try:
            images = _fashion_mnist()
        except FileNotFoundError:
            why = "Fashion-MNIST is neither on this machine nor can it be downloaded"
            images = _digits(test_fraction, f"scikit-learn's digits, since {why}")
        return _resized(images, image_size)

    path = Path(data).expanduser()
    if str(data) and path.exists():  # Path("") is the current folder
        return _folder(path, image_size, test_fraction)
    if path.name != str(data):  # has a separator, so it was meant as a path
        raise FileNotFoundError(f"{path} does not exist; give a folder with one subfolder of images per class")
    near = difflib.get_close_matches(str(data).lower(), NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown data {str(data)!r}: {hint}Give one of {', '.join(NAMES)}, or an existing folder")


def _standardised(images: Images) -> Images:
    std, mean = torch.std_mean(images.train_x, dim=(0, 2, 3), keepdim=True, correction=0)
    std = torch.where(std > 0, std, 1.0)  # a channel without contrast becomes all zeros
    return replace(images, train_x=(images.train_x - mean) / std, test_x=(images.test_x - mean) / std)


def _resized(images: Images, size: int | None) -> Images:
    if size is None:
        return images
    return replace(images, train_x=_resize_batch(images.train_x, size), test_x=_resize_batch(images.test_x, size))


def _resize_batch(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)


def _limited(images: Images, limit: int) -> Images:
    """The first images of each class in turn, `limit` in all."""
    if limit < len(images.classes):
        raise ValueError(
            f"limit={limit}: fewer training images than the {len(images.classes)} classes of {images.name}"
        )
    one_hot = F.one_hot(images.train_y, len(images.classes))  # (N, classes)
    turn = one_hot.cumsum(0).gather(1, images.train_y[:, None]).flatten()  # 1 for the first of its class, ...
    keep = turn.argsort(stable=True)[:limit].sort().values
    return replace(images, train_x=images.train_x[keep], train_y=images.train_y[keep])


def _stratified_split(y: Tensor, classes: Sequence[str], test_fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the test images, the same ones every time; each class is in both."""
    train, test = [], []
    for label, name in enumerate(classes):
        members = (y == label).nonzero().flatten()
        count = len(members)
        if count < 2:
            raise ValueError(f"class {name!r} has {count} image; a training and a test set need at least 2")
        # A generator for each class: its split does not depend on which other classes there are.
        members = members[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
        tests = min(max(1, round(test_fraction * count)), count - 1)
        test.append(members[:tests])
        train.append(members[tests:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def _digits(test_fraction: float, source: str) -> Images:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    y = torch.from_numpy(labels).long()
    classes = tuple(str(digit) for digit in range(10))
    train, test = _stratified_split(y, classes, test_fraction)
    return Images("digits", source, x[train], y[train], x[test], y[test], classes)


def _fashion_mnist() -> Images:
    """Fashion-MNIST from this machine, or downloaded; FileNotFoundError where neither works."""
    fetched = data_dir() / "fashion-mnist"
    for folder in (fetched, _FASHION_SYSTEM_FOLDER):
        if all((folder / name).is_file() for name in _FASHION_FILES):
            return _read_fashion_mnist(folder)
    try:
        _download_fashion_mnist(fetched)
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(
            f"Fashion-MNIST is not on this machine and its download failed ({error}). Either run "
            f"tools/fetch_fashion_mnist.sh (Debian, no root), which fills {fetched}; or install the Debian "
            f"package dataset-fashion-mnist, which fills {_FASHION_SYSTEM_FOLDER}; or try again with internet"
        ) from error
    return _read_fashion_mnist(fetched)


def _read_fashion_mnist(folder: Path) -> Images:
    tensors: list[Tensor] = []
    for images_name, labels_name in (_FASHION_FILES[:2], _FASHION_FILES[2:]):
        x, y = _read_idx(folder / images_name, ndim=3), _read_idx(folder / labels_name, ndim=1)
        if len(x) != len(y):
            raise ValueError(
                f"{folder / images_name} holds {len(x)} images, but {folder / labels_name} {len(y)} labels"
            )
        if y.max() >= len(_FASHION_CLASSES):
            raise ValueError(f"{folder / labels_name}: label {int(y.max())}, expected 0 to 9")
        tensors += [x.unsqueeze(1).float() / 255, y.long()]
    train_x, train_y, test_x, test_y = tensors
    source = f"Fashion-MNIST, read from {folder}"
    return Images("fashion-mnist", source, train_x, train_y, test_x, test_y, _FASHION_CLASSES)


def _read_idx(path: Path, ndim: int) -> Tensor:
    """A gzipped idx file of bytes -> uint8 tensor of ndim axes."""
    again = "Delete it and fetch the data again (tools/fetch_fashion_mnist.sh)"
    expected = f"a gzipped idx file with {ndim} axes"
    try:
        with gzip.open(path) as file:
            magic, *shape = struct.unpack(f">{1 + ndim}I", file.read(4 + 4 * ndim))
            expected = f"{math.prod(shape)} bytes of data ({' x '.join(map(str, shape))})"
            body = bytearray(file.read())
    except (EOFError, OSError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); expected {expected}. {again}") from error
    if magic != _IDX_BYTES + ndim:
        raise ValueError(f"{path} has the magic number {magic}, expected {_IDX_BYTES + ndim}. {again}")
    if len(body) != math.prod(shape) or not body:
        raise ValueError(f"{path} holds {len(body)} bytes of data, expected {expected}. {again}")
    return torch.frombuffer(body, dtype=torch.uint8).view(shape)


def _download_fashion_mnist(folder: Path) -> None:
    """Download Fashion-MNIST once and keep it in `folder` as idx files, which load in seconds."""
    from sklearn.datasets import fetch_openml

    logger.info("Downloading Fashion-MNIST (about 30 MB) into %s", folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as scratch:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns before it raises: the error says it all
                table = fetch_openml(
                    name="Fashion-MNIST",
                    version=1,
                    data_home=scratch,
                    as_frame=False,
                    parser="liac-arff",  # the other parser needs pandas
                    n_retries=1,
                    delay=0.1,
                )
        finally:
            socket.setdefaulttimeout(timeout)
        # The rows are the 60,000 training images, then the 10,000 test images.
        x = np.asarray(table.data, dtype=np.uint8).reshape(70_000, 28, 28)
        y = np.asarray(table.target).astype(np.uint8)
        whole = Path(scratch) / "fashion-mnist"
        whole.mkdir()
        for name, values in zip(_FASHION_FILES, (x[:60_000], y[:60_000], x[60_000:], y[60_000:]), strict=True):
            with gzip.open(whole / name, "wb", compresslevel=1) as file:
                file.write(struct.pack(f">{1 + values.ndim}I", _IDX_BYTES + values.ndim, *values.shape))
                file.write(values.tobytes())
        shutil.rmtree(folder, ignore_errors=True)
        whole.rename(folder)


def _folder(root: Path, image_size: int | None, test_fraction: float) -> Images:
    """A user's folder of class folders, or of train/ and test/ with class folders."""
    if not root.is_dir():
        raise ValueError(f"{root} is a file; give a folder with one subfolder of images per class")
    given = [split for split in ("train", "test") if _subfolders(root / split)]
    if len(given) == 1:
        missing = "test" if given == ["train"] else "train"
        raise ValueError(f"{root} has class folders in {given[0]}/ but none in {missing}/; give both or neither")
    if given:
        train, classes = _class_files(root / "train")
        test, test_classes = _class_files(root / "test")
        if classes != test_classes:
            odd = ", ".join(sorted(set(classes) ^ set(test_classes)))
            raise ValueError(f"{root}: train/ and test/ must have the same classes; only one of them has {odd}")
        how = "with its own test set"
    else:
        labelled, classes = _class_files(root)
        rows = _stratified_split(torch.tensor([label for _, label in labelled]), classes, test_fraction)
        train, test = ([labelled[i] for i in split.tolist()] for split in rows)
        how = f"of which {len(test)} are held out for testing"

    files = [path for path, _ in train + test]
    x = _read_files(files, image_size)
    y = torch.tensor([label for _, label in train + test])
    n = len(train)
    images = Images(
        name=root.resolve().name,
        source=f"{len(files)} images from {root}, {how}",
        train_x=x[:n],
        train_y=y[:n],
        test_x=x[n:],
        test_y=y[n:],
        classes=classes,
    )
    check_finite(images, files)
    return images


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def _class_files(root: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """Each image of root's class folders with its label, and the names of the classes."""
    folders = _subfolders(root)
    layout = "one subfolder of images per class is expected"
    if not folders:
        found = "images but no class subfolders" if _image_files(root) else "neither subfolders nor images"
        raise ValueError(f"{root} has {found}; {layout}")
    if len(folders) == 1:
        raise ValueError(f"{root} has a single class, {folders[0].name!r}; classification needs at least 2")
    labelled = []
    for label, folder in enumerate(folders):
        files = _image_files(folder)
        if not files:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"class folder {folder} has no images ({kinds}) directly in it; {layout}")
        labelled += [(path, label) for path in files]
    return labelled, tuple(folder.name for folder in folders)


def _read_files(files: Sequence[Path], image_size: int | None) -> Tensor:
    """Images of one size, (N, C, H, W) float32: C = 1 if all of them are grey, else 3."""
    images: list[Tensor] = []
    for path in files:
        image = _read_image(path)
        if image_size is not None:
            image = _resize_batch(image[None], image_size)[0]
        elif images and image.shape[1:] != images[0].shape[1:]:
            (h0, w0), (h1, w1) = images[0].shape[1:], image.shape[1:]
            raise ValueError(
                f"images differ in size: {files[0]} is {w0} x {h0} pixels, {path} is {w1} x {h1}; "
                "give an image_size to resize all of them to"
            )
        images.append(image)
    channels = max(image.shape[0] for image in images)
    return torch.stack([image.expand(channels, -1, -1) for image in images])


def _read_image(path: Path) -> Tensor:
    """(1, H, W) if the image is grey, else (3, H, W); float32, in [0, 1] unless the file stores floats."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode == "F":
                pixels, scale = image, 1.0
            elif image.mode.startswith("I"):  # 16 bits
                pixels, scale = image, 65535.0
            elif image.mode in ("1", "L", "LA"):
                pixels, scale = image.convert("L"), 255.0
            else:
                # Through RGBA: a palette with transparency does not convert to RGB without a warning.
                pixels, scale = image.convert("RGBA").convert("RGB"), 255.0
            values = torch.from_numpy(np.array(pixels, dtype=np.float32)) / scale
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if values.ndim == 2:
        return values.unsqueeze(0)
    image_chw = values.movedim(-1, 0)
    is_grey = bool((image_chw == image_chw[:1]).all())
    return image_chw[:1] if is_grey else image_chw
