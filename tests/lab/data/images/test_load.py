"""From a name to images: every source, every option, every name that is wrong."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.lab.data.samples import MakeFolder, assert_standardised, tiny, write_fashion

from einlinear_lab.data import load_images
from einlinear_lab.data.images import load


def test_digits() -> None:
    images = load_images("digits")
    assert (images.name, images.channels, images.size, images.features) == ("digits", 1, (8, 8), 64)
    assert len(images.train_x) + len(images.test_x) == 1797
    assert len(images.test_x) == pytest.approx(0.2 * 1797, abs=10)
    assert images.classes == tuple("0123456789")
    assert_standardised(images)


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = load._read_digits(0.2)
    rows = {(*pixel, label) for pixel, label in zip(map(tuple, pixels), labels)}
    x, y = torch.cat([images.train_x, images.test_x]), torch.cat([images.train_y, images.test_y])
    assert {(*pixel, label) for pixel, label in zip(map(tuple, (16 * x).flatten(1).tolist()), y.tolist())} == rows


def test_digits_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "find_spec", lambda package: None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        load_images("digits")


def test_auto_falls_back_to_digits_and_says_so() -> None:
    images = load_images("auto")
    assert images.name == "digits"
    assert "Fashion-MNIST is neither on this machine nor can it be downloaded" in images.source


def test_auto_does_not_hide_corrupt_files(no_data: Path) -> None:
    write_fashion(no_data)
    (no_data / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is truncated or corrupt"):
        load_images("auto")


@pytest.mark.parametrize("size", [4, 12])
def test_image_size(size: int, make_folder: MakeFolder, no_data: Path) -> None:
    write_fashion(no_data)
    folder = make_folder({"cat": 3, "dog": 3})
    Image.new("L", (40, 30)).save(folder / "cat" / "larger.png")
    for source in ("digits", "fashion-mnist", folder):
        images = load_images(source, image_size=size)
        assert images.size == (size, size)
        assert images.test_x.shape[2:] == (size, size)
        assert_standardised(images)


@pytest.mark.parametrize("limit", [10, 23, 1400, 5000])
def test_limit_is_balanced(limit: int) -> None:
    everything = load_images("digits")
    images = load_images("digits", limit=limit)
    assert len(images.train_x) == len(images.train_y) == min(limit, len(everything.train_x))
    counts = images.train_y.bincount(minlength=10)
    available = everything.train_y.bincount(minlength=10)
    most = counts.max()
    assert ((counts == available) | (counts >= most - 1)).all()
    assert len(images.test_x) == len(everything.test_x)
    assert_standardised(images)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "unknown data 'digit'. Did you mean 'digits'?"),
        ("Fashion-MNIST", "Did you mean 'fashion-mnist'?"),
        ("cifar10", "unknown data 'cifar10'. Give one of auto, fashion-mnist, digits, or an existing folder"),
        ("", "Give one of auto, fashion-mnist, digits"),
    ],
)
def test_unknown_name(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_images(name)


def test_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give a folder"):
        load_images(tmp_path / "nowhere")


def test_any_source_is_checked_for_finite_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    images = tiny()
    images.test_x[1, 0, 2] = float("nan")
    monkeypatch.setattr(load, "_read", lambda *_: images)
    with pytest.raises(ValueError, match="tiny: 4 pixels of 1 test images are NaN or infinite; all pixels"):
        load_images("digits")


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("image_size", 0, "image_size=0: it must be at least 1"),
        ("test_fraction", 0.0, "test_fraction=0.0: it must lie between 0 and 1"),
        ("test_fraction", 1.0, "test_fraction=1.0: it must lie between 0 and 1"),
        ("limit", 9, "limit=9: fewer training images than the 10 classes of digits"),
    ],
)
def test_bad_arguments(argument: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_images("digits", **{argument: value})
