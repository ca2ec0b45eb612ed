"""A user's folder of images: layouts, image files, and what is wrong with them."""

import os
import re
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.lab.data.samples import MakeFolder, assert_standardised

from einlinear_lab.data import load_images
from einlinear_lab.data.images.folder import MAX_PIXELS, SUFFIXES, _read_files, _read_image


def test_folder_is_split_by_class(make_folder: MakeFolder) -> None:
    folder = make_folder({"dog": 10, "cat": 20, "eel": 2})
    images = load_images(folder, test_fraction=0.3)
    assert images.name == str(folder.resolve())
    assert images.classes == ("cat", "dog", "eel")
    assert (images.channels, images.size, images.features) == (1, (5, 6), 30)
    assert images.train_y.bincount().tolist() == [14, 7, 1]
    assert images.test_y.bincount().tolist() == [6, 3, 1]
    assert "held out" in images.source
    assert_standardised(images)

    again = load_images(str(folder), test_fraction=0.3)
    assert torch.equal(again.train_x, images.train_x)
    assert torch.equal(again.test_x, images.test_x)
    unique = torch.cat([images.train_x, images.test_x]).flatten(1).unique(dim=0)
    assert len(unique) == 32, "an image is in both sets, or in neither"


def test_folder_with_its_own_test_set(make_folder: MakeFolder, tmp_path: Path) -> None:
    make_folder({"cat": 3, "dog": 2}, at="pets/train")
    make_folder({"cat": 1, "dog": 4}, at="pets/test")
    images = load_images(tmp_path / "pets")
    assert images.train_y.tolist() == [0, 0, 0, 1, 1]
    assert images.test_y.tolist() == [0, 1, 1, 1, 1]


def test_classes_may_be_called_train_and_test(make_folder: MakeFolder) -> None:
    assert load_images(make_folder({"train": 3, "test": 3})).classes == ("test", "train")


def test_colour_wherever_one_image_has_it(make_folder: MakeFolder) -> None:
    folder = make_folder({"cat": 4, "dog": 4})
    assert load_images(folder).channels == 1
    Image.new("RGB", (6, 5), (90, 90, 90)).save(folder / "cat" / "stored_as_colour_but_grey.png")
    assert load_images(folder).channels == 1
    Image.new("RGB", (6, 5), (90, 80, 70)).save(folder / "cat" / "colour.png")
    assert load_images(folder).channels == 3


@pytest.mark.parametrize(
    ("mode", "level", "expected"),
    [
        ("1", 1, 1.0),
        ("L", 51, 0.2),
        ("LA", (51, 255), 0.2),
        ("RGB", (51, 51, 51), 0.2),
        ("RGBA", (51, 51, 51, 255), 0.2),
        ("I;16", 13107, 0.2),
        ("F", 7.5, 7.5),
    ],
)
def test_pixel_modes(mode: str, level: float | tuple[int, ...], expected: float, tmp_path: Path) -> None:
    path = tmp_path / "image.tiff"
    Image.new(mode, (3, 2), level).save(path)
    torch.testing.assert_close(_read_image(path), torch.full((1, 2, 3), expected))


def test_palette(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 255, 51, 0])
    image.save(path, transparency=b"\x00\xff")
    expected = torch.tensor([1.0, 0.2, 0.0]).view(3, 1, 1).expand(3, 2, 3)
    torch.testing.assert_close(_read_image(path), expected)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    Image.new("L", (3, 2)).save(path, exif=exif)
    assert _read_image(path).shape == (1, 3, 2)


def test_other_files_are_left_alone(make_folder: MakeFolder) -> None:
    folder = make_folder({"cat": 3, "dog": 3})
    (folder / "notes.txt").write_text("x")
    (folder / "cat" / "notes.txt").write_text("x")
    (folder / "cat" / ".hidden.png").write_text("x")
    (folder / ".git").mkdir()
    images = load_images(folder)
    assert len(images.train_x) + len(images.test_x) == 6
    assert images.classes == ("cat", "dog")


def test_shrinking_is_antialiased(tmp_path: Path, make_folder: MakeFolder) -> None:
    stripes = np.tile(np.array([0, 255, 255, 0], np.uint8), (16, 4))
    folder = make_folder({"cat": 2, "dog": 2}, size=(16, 16))
    Image.fromarray(stripes).save(folder / "cat" / "stripes.png")
    images, _ = _read_files([folder / "cat" / "stripes.png"], image_size=4)
    (x,) = images.values()
    torch.testing.assert_close(x[:, :, 1:3], torch.full((1, 4, 2), 0.5), atol=0.01, rtol=0)


def test_a_channel_without_contrast_stays_finite(tmp_path: Path, make_folder: MakeFolder) -> None:
    folder = make_folder({"cat": 0, "dog": 0})
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
        Image.new("L", (4, 4), 9).save(folder / name)
    images = load_images(folder)
    assert torch.equal(images.train_x, torch.zeros(2, 1, 4, 4))


def test_path_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"a\.png is a file; give a folder"):
        load_images(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "pets has neither subfolders nor images; one subfolder of images per class"),
        ({".": 3}, "pets has images but no class subfolders"),
        ({"cat": 3}, "pets has a single class, 'cat'; classification needs at least 2"),
        (
            {"all/cat": 3, "all/dog": 3},
            "pets has a single class, 'all'; classification needs at least 2. Did you mean ",
        ),
        ({"cat": 3, "dog": 0}, "dog has no images"),
        ({"cat": 3, "dog": 1}, "class 'dog' has 1 image; a training and a test set need at least 2"),
        ({"train/cat": 3, "train/dog": 3}, "class folders in train/ but none in test/; give both or neither"),
        ({"test/cat": 3, "test/dog": 3}, "class folders in test/ but none in train/; give both or neither"),
        (
            {"train/cat": 3, "train/dog": 3, "test/cat": 3, "test/eel": 3},
            "train/ and test/ must have the same classes; only one of them has dog, eel",
        ),
    ],
)
def test_folder_layout(classes: dict[str, int], message: str, make_folder: MakeFolder, tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    for name, count in classes.items():
        if name == ".":
            Image.new("L", (4, 4)).save(tmp_path / "pets" / "image.png")
        else:
            make_folder({name: count})
    with pytest.raises(ValueError, match=re.escape(message)):
        load_images(tmp_path / "pets")


def test_images_of_different_sizes(make_folder: MakeFolder) -> None:
    folder = make_folder({"cat": 3, "dog": 3})
    Image.new("L", (7, 5)).save(folder / "dog" / "wide.png")
    with pytest.raises(ValueError, match=r"0\.png is 6 x 5 pixels, .*wide\.png is 7 x 5; give an image_size"):
        load_images(folder, test_fraction=0.01)


@pytest.mark.parametrize("keep", [0, 20, 60])
def test_image_that_cannot_be_read(keep: int, make_folder: MakeFolder) -> None:
    folder = make_folder({"cat": 3, "dog": 3}, size=(32, 32))
    victim = folder / "cat" / "1.png"
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cat/1\.png cannot be read as an image: "):
        load_images(folder)


def test_all_broken_images_are_named_at_once(make_folder: MakeFolder) -> None:
    folder = make_folder({"cat": 20, "dog": 8})
    whole = load_images(folder)
    for i in range(14):
        (folder / "cat" / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"14 of 28 images are broken: .*cat/0\.png cannot be read") as caught:
        load_images(folder)
    message = str(caught.value)
    assert message.count("cannot be read as an image") == 10
    assert "; and 4 more. Repair or remove them, or leave out what cannot be read: skip_broken=true" in message

    found = load_images(folder, skip_broken=True)
    assert len(found.train_x) + len(found.test_x) == 14
    assert found.skipped == tuple(sorted(f"cat/{i}.png" for i in range(14)))
    assert "14 images from" in found.source
    assert "without cat/0.png, cat/1.png" in found.source
    assert whole.skipped == ()
    for i in range(14):
        (folder / "cat" / f"{i}.png").unlink()
    assert torch.equal(load_images(folder).train_x, found.train_x), "as if they were not there"


def test_what_is_left_without_broken_images(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder({f"{split}/{name}": 2 for split in ("train", "test") for name in ("cat", "dog")})
    (folder / "train" / "dog" / "0.png").write_bytes(b"")
    Image.fromarray(np.full((5, 6), np.nan, np.float32)).save(folder / "train" / "cat" / "nan.tiff")
    found = load_images(folder, skip_broken=True)
    assert found.skipped == ("train/cat/nan.tiff", "train/dog/0.png")
    assert (len(found.train_x), len(found.test_x)) == (3, 4)
    (folder / "train" / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"class 'dog' has no image left in .*train: all of them are broken"):
        load_images(folder, skip_broken=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("split", ["train", "test"])
def test_pixels_that_are_not_finite(value: float, split: str, tmp_path: Path) -> None:
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / name / f"{i}.tiff")
    for i, bad in ((1, 2), (2, 1)):
        pixels = np.ones((4, 4), np.float32)
        pixels[0, :bad] = value
        Image.fromarray(pixels).save(tmp_path / split / "dog" / f"{i}.tiff")
    message = (
        rf"2 of 12 images are broken: .*{split}/dog/1\.tiff has NaN or infinite pixels \(2 of 16\); "
        rf".*{split}/dog/2\.tiff has NaN or infinite pixels \(1 of"
    )
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 5\n%%EndComments\nshowpage\n"


def test_postscript_under_another_name_never_reaches_ghostscript(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interpreter(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", interpreter)
    folder = make_folder({"cat": 3, "dog": 3})
    (folder / "cat" / "1.png").write_bytes(POSTSCRIPT)
    message = r"cat/1\.png cannot be read as an image: it is none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"
    with pytest.raises(ValueError, match=message):
        load_images(folder)


@pytest.mark.parametrize("suffix", ["tga", "ico", "pcx"])
def test_formats_that_are_not_documented_are_not_read(suffix: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / f"image.{suffix}")
    path = (tmp_path / f"image.{suffix}").rename(tmp_path / "image.png")
    with pytest.raises(ValueError, match="it is none of BMP"):
        _read_image(path)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_suffix_is_of_a_format_that_is_read(suffix: str, tmp_path: Path) -> None:
    Image.new("L", (8, 8), 51).save(tmp_path / f"image{suffix}")
    torch.testing.assert_close(_read_image(tmp_path / f"image{suffix}")[:1], torch.full((1, 8, 8), 0.2))


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "folder"])
def test_only_regular_files_are_opened(kind: str, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder({"cat": 3, "dog": 3})
    victim = folder / "cat" / "1.png"
    victim.unlink()
    if kind == "fifo":
        os.mkfifo(victim)  # nobody writes into it: to open it as a file would wait for ever
    elif kind == "device":
        victim.symlink_to("/dev/zero")
    elif kind == "socket":
        monkeypatch.chdir(victim.parent)  # the path of a socket has to be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(victim.name)
    else:
        victim.mkdir()
    with pytest.raises(ValueError, match=r"cat/1\.png cannot be read as an image: it is not a regular file"):
        load_images(folder)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large, and ends where its pixels would begin."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    ends = struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 1000) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + ends


@pytest.mark.parametrize("size", [(13_000, 13_000), (30_000, 30_000), (1, MAX_PIXELS + 1)])
def test_size_is_judged_by_the_header(size: tuple[int, int], make_folder: MakeFolder) -> None:
    folder = make_folder({"cat": 3, "dog": 3})
    (folder / "cat" / "1.png").write_bytes(png_header(*size))
    with pytest.raises(ValueError, match=rf"cat/1\.png cannot be read .*more than the {MAX_PIXELS:,} pixels"):
        load_images(folder)


def test_the_largest_size_is_not_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(png_header(1000, MAX_PIXELS // 1000))
    with pytest.raises(ValueError, match=r"cannot be read as an image: (?!.*more than)"):  # there are no pixels
        _read_image(tmp_path / "image.png")


@pytest.mark.parametrize("error", [IndexError("x"), OverflowError("x"), zlib.error("x"), AssertionError("x")])
def test_whatever_a_damaged_file_does_to_the_decoder(
    error: Exception, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder({"cat": 3, "dog": 3})

    def broken(_: object) -> None:
        raise error

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", broken)
    with pytest.raises(ValueError, match=r"cat/\d\.png cannot be read as an image"):
        load_images(folder)
