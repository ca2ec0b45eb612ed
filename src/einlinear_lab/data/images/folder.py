"""A folder of the user's with one subfolder of images per class."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from einlinear.files import open_regular
from einlinear_lab.data.images.dataset import Images, resize, stratified_split

# Of an extra: imported where it is used.
if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# Formats that Pillow may read, whatever the name. Among its other ones is PostScript, which Ghostscript runs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Of one image. With three channels they take 1 GB as float32. Pillow itself warns from 89 million on.
MAX_PIXELS = 80_000_000
# The number of broken files that are named.
_SHOWN = 10


def read_folder(root: Path, image_size: int | None, test_fraction: float, skip_broken: bool = False) -> Images:
    if not root.is_dir():
        raise ValueError(
            f"{root} is a file; give a folder with one subfolder of images per class, or make a text ready first: "
            f"einlinear prepare {root} --out FOLDER"
        )
    splits = {split: bool(_subfolders(root / split)) for split in ("train", "test")}
    has_test = all(splits.values())
    if any(splits.values()) and not has_test:
        present, missing = sorted(splits, key=splits.__getitem__, reverse=True)
        raise ValueError(f"{root} has class folders in {present}/ but none in {missing}/; give both or neither")
    train, classes = _class_files(root / "train" if has_test else root)
    test, test_classes = _class_files(root / "test") if has_test else ([], classes)
    if classes != test_classes:
        odd = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise ValueError(f"{root}: train/ and test/ must have the same classes; only one of them has {odd}")

    images, broken = _read_files([path for path, _ in train + test], image_size, skip_broken)
    train, test = ([item for item in split if item[0] in images] for split in (train, test))
    if has_test:
        how = "with its own test set"
        for split, name in ((train, "train"), (test, "test")):
            for label in {*range(len(classes))} - {label for _, label in split}:
                raise ValueError(f"class {classes[label]!r} has no image left in {root / name}: all of them are broken")
    else:
        rows = stratified_split(torch.tensor([label for _, label in train]), classes, test_fraction)
        train, test = ([train[i] for i in part.tolist()] for part in rows)
        how = f"of which {len(test)} are held out for testing"

    # Grey if all images are.
    channels = max(image.shape[0] for image in images.values())
    x = torch.stack([images[path].expand(channels, -1, -1) for path, _ in train + test])
    y = torch.tensor([label for _, label in train + test])
    n = len(train)
    skipped = tuple(str(path.relative_to(root)) for path in broken)
    without = f"; without {_listed(skipped)}, which cannot be read" if skipped else ""
    source = f"{len(x)} images from {root}, {how}{without}"
    # Two folders may have the same last name, or that of a built-in data set.
    return Images(str(root.resolve()), source, x[:n], y[:n], x[n:], y[n:], classes, skipped)


def _listed(words: Iterable[str], between: str = ", ") -> str:
    words = [*words]
    more = f"{between}and {len(words) - _SHOWN} more" if words[_SHOWN:] else ""
    return between.join(words[:_SHOWN]) + more


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()]


def _image_files(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.suffix.lower() in SUFFIXES]


def _class_files(root: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    folders = _subfolders(root)
    layout = "one subfolder of images per class is expected"
    if not folders:
        content = "images but no class subfolders" if _image_files(root) else "neither subfolders nor images"
        raise ValueError(f"{root} has {content}; {layout}")
    if len(folders) == 1:
        hint = f". Did you mean {folders[0]}?" if len(_subfolders(folders[0])) > 1 else ""
        raise ValueError(f"{root} has a single class, {folders[0].name!r}; classification needs at least 2{hint}")
    labelled = [(path, label) for label, folder in enumerate(folders) for path in _image_files(folder)]
    for label in {*range(len(folders))} - {label for _, label in labelled}:
        kinds = ", ".join(sorted(SUFFIXES))
        raise ValueError(f"class folder {folders[label]} has no images ({kinds}) directly in it; {layout}")
    return labelled, tuple(folder.name for folder in folders)


def _read_files(
    files: Sequence[Path], image_size: int | None, skip_broken: bool = False
) -> tuple[dict[Path, Tensor], dict[Path, str]]:
    """Return images of one size, each (1, H, W) or (3, H, W), and the errors of the broken ones if they are skipped."""
    images: dict[Path, Tensor] = {}
    broken: dict[Path, str] = {}
    for path in files:
        try:
            image = _read_image(path)
            if bad := int((~image.isfinite()).sum()):
                raise ValueError(f"{path} has NaN or infinite pixels ({bad} of {image.numel()})")
        except ValueError as error:
            broken[path] = str(error)
            continue
        images[path] = image if image_size is None else resize(image[None], image_size)[0]
    if broken and not skip_broken:
        number = f"{len(broken)} of {len(files)} images are broken: " if len(broken) > 1 else ""
        raise ValueError(
            f"{number}{_listed(broken.values(), '; ')}. Repair or remove them, or leave out what cannot be read: "
            "skip_broken=true (--skip-broken)"
        )
    sizes: dict[str, Path] = {}
    for path, image in images.items():
        sizes.setdefault(f"{image.shape[2]} x {image.shape[1]}", path)
    if len(sizes) > 1:
        (size, first), (other, second) = list(sizes.items())[:2]
        raise ValueError(
            f"images differ in size: {first} is {size} pixels, {second} is {other}; give an image_size, such as "
            "image_size=32, to resize all of them to"
        )
    return images, broken


def _read_image(path: Path) -> Tensor:
    """Read an image as (1, H, W) if it is grey, else (3, H, W); float32, in [0, 1] unless the file stores floats."""
    from PIL import ImageOps

    try:
        with open_regular(path) as stream, _opened(stream) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode == "F":
                pixels, scale = image, 1.0
            # 16 bits.
            elif image.mode.startswith("I"):
                pixels, scale = image, 65535.0
            elif image.mode in ("1", "L", "LA"):
                pixels, scale = image.convert("L"), 255.0
            else:
                # Through RGBA: a palette with transparency does not convert to RGB without a warning.
                pixels, scale = image.convert("RGBA").convert("RGB"), 255.0
            values = torch.from_numpy(np.array(pixels, dtype=np.float32)) / scale
    # A decoder may raise anything when a file is hostile.
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an image: {str(error) or type(error).__name__}") from error
    image_chw = values[None] if values.ndim == 2 else values.movedim(-1, 0)
    is_grey = bool((image_chw == image_chw[:1]).all())
    return image_chw[:1] if is_grey else image_chw


def _opened(stream: BinaryIO) -> Image:
    """Open an image of `FORMATS` and at most `MAX_PIXELS`, and read its header only."""
    from PIL import Image, UnidentifiedImageError

    too_large = f"it has more than the {MAX_PIXELS:,} pixels that are read; scale it down"
    try:
        with warnings.catch_warnings():
            # An error is raised below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(FORMATS)}, or damaged") from None
    except Image.DecompressionBombError:
        raise ValueError(too_large) from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(too_large)
    return image
