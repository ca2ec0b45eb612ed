"""Where images come from, how they look once loaded, every error's message, and reproducible batches."""

import gzip
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from einlinear.experiments import data
from einlinear.experiments.data import Augment, Images, batches, load_images, pixel_permutation

FASHION = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
MakeFolder = Callable[..., Path]


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">{1 + values.ndim}I", 2048 + values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes(), compresslevel=1))


def write_fashion(folder: Path, train: int = 40, test: int = 20) -> None:
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("t10k", test)):
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", random.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", np.arange(count) % 10)


@pytest.fixture(autouse=True)
def no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without Fashion-MNIST and without internet; returns the folder where fetched data belongs."""

    def offline(**_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("EINLINEAR_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "_FASHION_SYSTEM_FOLDER", tmp_path / "system")
    monkeypatch.setattr("sklearn.datasets.fetch_openml", offline)
    return tmp_path / "cache" / "fashion-mnist"


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Writes a folder of random PNGs: make_folder({"cat": 3, "dog": 4}, mode="L", size=(6, 5))."""

    def make(classes: dict[str, int], mode: str = "L", size: tuple[int, int] = (6, 5), at: str = "pets") -> Path:
        random = np.random.default_rng(len(classes))
        for name, count in classes.items():
            (tmp_path / at / name).mkdir(parents=True)
            for i in range(count):
                shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
                pixels = random.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / at / name / f"{i}.png")
        return tmp_path / at

    return make


def tiny(train: int = 50, classes: int = 5) -> Images:
    """Images whose every pixel is distinct within a channel, so that a moved pixel is noticed."""
    x = torch.arange(train * 2 * 6 * 4, dtype=torch.float32).view(train, 2, 6, 4)
    y = torch.arange(train) % classes
    return Images("tiny", "made up", x, y, x[:3].clone(), y[:3], tuple("abcdefgh"[:classes]))


def assert_standardised(images: Images) -> None:
    axes = (0, 2, 3)
    assert images.train_x.dtype == images.test_x.dtype == torch.float32
    assert images.train_y.dtype == images.test_y.dtype == torch.int64
    torch.testing.assert_close(images.train_x.mean(axes), torch.zeros(images.channels), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.train_x.std(axes, correction=0), torch.ones(images.channels))


# --- sources


def test_digits() -> None:
    images = load_images("digits")
    assert (images.name, images.channels, images.size, images.features) == ("digits", 1, (8, 8), 64)
    assert len(images.train_x) + len(images.test_x) == 1797
    assert len(images.test_x) == pytest.approx(0.2 * 1797, abs=10)
    assert images.classes == tuple("0123456789")
    assert_standardised(images)


@pytest.mark.parametrize("where", ["fetched", "system"])
@pytest.mark.parametrize("name", ["fashion-mnist", "auto"])
def test_fashion_mnist_on_this_machine(where: str, name: str, no_data: Path, tmp_path: Path) -> None:
    folder = no_data if where == "fetched" else tmp_path / "system"
    write_fashion(folder)
    images = load_images(name)
    assert (images.name, len(images.train_x), len(images.test_x)) == ("fashion-mnist", 40, 20)
    assert images.size == (28, 28)
    assert images.train_y[:12].tolist() == [*range(10), 0, 1]
    assert str(folder) in images.source
    assert_standardised(images)

    def pixels(split: str) -> np.ndarray:
        raw = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
        return np.frombuffer(raw[16:], np.uint8).astype(np.float64)

    mean, std = pixels("train").mean(), pixels("train").std()
    for split, x in (("train", images.train_x), ("t10k", images.test_x)):
        expected = torch.from_numpy((pixels(split) - mean) / std)
        torch.testing.assert_close(x.flatten(), expected.float())


def test_data_folder_defaults_to_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EINLINEAR_DATA", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert data.data_dir() == Path("/home/someone/.cache/einlinear")


def test_fashion_mnist_download_is_kept(no_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(**arguments: object) -> SimpleNamespace:
        calls.append(arguments)
        pixels = np.zeros((70_000, 784))
        pixels[0, 1] = pixels[60_000, 2] = 255
        return SimpleNamespace(data=pixels, target=np.array([str(i % 10) for i in range(70_000)]))

    monkeypatch.setattr("sklearn.datasets.fetch_openml", download)
    for _ in range(2):
        images = load_images("fashion-mnist")
        assert (len(images.train_x), len(images.test_x)) == (60_000, 10_000)
        assert images.train_x[0].argmax() == 1
        assert images.test_x[0].argmax() == 2
        assert images.test_y[:3].tolist() == [0, 1, 2]
    assert len(calls) == 1
    assert [path.name for path in no_data.parent.iterdir()] == ["fashion-mnist"]


def test_fashion_mnist_out_of_reach_names_three_ways() -> None:
    with pytest.raises(FileNotFoundError) as error:
        load_images("fashion-mnist")
    for way in ("no route to host", "fetch_fashion_mnist.sh", "dataset-fashion-mnist", "internet"):
        assert way in str(error.value)


def test_auto_falls_back_to_digits_and_says_so() -> None:
    images = load_images("auto")
    assert images.name == "digits"
    assert "Fashion-MNIST is neither on this machine nor can it be downloaded" in images.source


def test_auto_does_not_hide_corrupt_files(no_data: Path) -> None:
    write_fashion(no_data)
    (no_data / "train-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is truncated or corrupt"):
        load_images("auto")


def test_folder_is_split_by_class(make_folder: MakeFolder) -> None:
    folder = make_folder({"dog": 10, "cat": 20, "eel": 2})
    images = load_images(folder, test_fraction=0.3)
    assert images.name == "pets"
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
    torch.testing.assert_close(data._read_image(path), torch.full((1, 2, 3), expected))


def test_palette(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 255, 51, 0])
    image.save(path, transparency=b"\x00\xff")
    expected = torch.tensor([1.0, 0.2, 0.0]).view(3, 1, 1).expand(3, 2, 3)
    torch.testing.assert_close(data._read_image(path), expected)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    Image.new("L", (3, 2)).save(path, exif=exif)
    assert data._read_image(path).shape == (1, 3, 2)


def test_other_files_are_left_alone(make_folder: MakeFolder) -> None:
    folder = make_folder({"cat": 3, "dog": 3})
    (folder / "notes.txt").write_text("x")
    (folder / "cat" / "notes.txt").write_text("x")
    (folder / "cat" / ".hidden.png").write_text("x")
    (folder / ".git").mkdir()
    images = load_images(folder)
    assert len(images.train_x) + len(images.test_x) == 6
    assert images.classes == ("cat", "dog")


# --- options


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


def test_shrinking_is_antialiased(tmp_path: Path, make_folder: MakeFolder) -> None:
    stripes = np.tile(np.array([0, 255, 255, 0], np.uint8), (16, 4))
    folder = make_folder({"cat": 2, "dog": 2}, size=(16, 16))
    Image.fromarray(stripes).save(folder / "cat" / "stripes.png")
    x = data._read_files([folder / "cat" / "stripes.png"], image_size=4)
    torch.testing.assert_close(x[:, :, :, 1:3], torch.full((1, 1, 4, 2), 0.5), atol=0.01, rtol=0)


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


def test_a_channel_without_contrast_stays_finite(tmp_path: Path, make_folder: MakeFolder) -> None:
    folder = make_folder({"cat": 0, "dog": 0})
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
        Image.new("L", (4, 4), 9).save(folder / name)
    images = load_images(folder)
    assert torch.equal(images.train_x, torch.zeros(2, 1, 4, 4))


# --- errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "unknown data 'digit': did you mean 'digits'?"),
        ("Fashion-MNIST", "did you mean 'fashion-mnist'?"),
        ("cifar10", "unknown data 'cifar10': Give one of auto, fashion-mnist, digits, or an existing folder"),
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("split", "called"), [("train", "training"), ("test", "test")])
def test_pixels_that_are_not_finite(value: float, split: str, called: str, tmp_path: Path) -> None:
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / name / f"{i}.tiff")
    for i, bad in ((1, 2), (2, 1)):
        pixels = np.ones((4, 4), np.float32)
        pixels[0, :bad] = value
        Image.fromarray(pixels).save(tmp_path / split / "dog" / f"{i}.tiff")
    message = rf"3 pixels of 2 {called} images are NaN or infinite, first in .*{split}/dog/1\.tiff"
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path)


def test_any_source_is_checked_for_finite_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    images = tiny()
    images.test_x[1, 0, 2] = float("nan")
    monkeypatch.setattr(data, "_read", lambda *_: images)
    with pytest.raises(ValueError, match="tiny: 4 pixels of 1 test images are NaN or infinite; all pixels"):
        load_images("digits")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda raw: raw[: len(raw) // 2],
            r"is truncated or corrupt \(.*\); expected 31360 bytes of data \(40 x",
        ),
        (lambda raw: b"", r"is truncated or corrupt \(.*\); expected a gzipped idx file with 3 axes"),
        (lambda raw: b"plain text", r"is truncated or corrupt \(Not a gzipped file"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-5]), "holds 31355 bytes of data, expected 31360"),
        (lambda raw: gzip.compress(gzip.decompress(raw) + b"x"), "holds 31361 bytes of data, expected 31360"),
        (lambda raw: gzip.compress(b"\0\0\x08\x01" + gzip.decompress(raw)[4:]), "number 2049, expected 2051"),
        (lambda raw: gzip.compress(struct.pack(">4I", 2051, 0, 28, 28)), "holds 0 bytes of data"),
    ],
)
def test_damaged_idx_file(damage: Callable[[bytes], bytes], message: str, no_data: Path) -> None:
    write_fashion(no_data)
    victim = no_data / "train-images-idx3-ubyte.gz"
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte\.gz .*{message}.*Delete it and fetch"):
        load_images("fashion-mnist")


def test_every_idx_file_is_checked(no_data: Path) -> None:
    for name in FASHION:
        write_fashion(no_data)
        (no_data / f"{name}-ubyte.gz").write_bytes(b"")
        with pytest.raises(ValueError, match=name):
            load_images("fashion-mnist")


def test_labels_must_match_images(no_data: Path) -> None:
    write_fashion(no_data)
    write_idx(no_data / "t10k-labels-idx1-ubyte.gz", np.zeros(19))
    with pytest.raises(ValueError, match=r"t10k-images.* holds 20 images, but .*t10k-labels.* 19 labels"):
        load_images("fashion-mnist")
    write_idx(no_data / "t10k-labels-idx1-ubyte.gz", np.full(20, 10))
    with pytest.raises(ValueError, match=r"t10k-labels.*: label 10, expected 0 to 9"):
        load_images("fashion-mnist")


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


# --- augmentation


def edge_shifted(image: Tensor, dy: int, dx: int) -> Tensor:
    """(C, H, W) moved by (dy, dx) pixels, its edges repeated: by index, a second way to say the same."""
    _, height, width = image.shape
    rows = (torch.arange(height) - dy).clamp(0, height - 1)
    columns = (torch.arange(width) - dx).clamp(0, width - 1)
    return image[:, rows][:, :, columns]


def test_shifts_are_whole_pixels_and_each_image_has_its_own() -> None:
    x = tiny(train=200).train_x
    before = x.clone()
    out = Augment((6, 4), shift=2)(x, torch.Generator().manual_seed(0))
    assert torch.equal(x, before)
    found = []
    for image, moved in zip(x, out, strict=True):
        matches = [
            (dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if torch.equal(moved, edge_shifted(image, dy, dx))
        ]
        assert len(matches) == 1
        found += matches
    assert len(set(found)) == 25, "200 draws of 25 shifts: each is as good as certain to occur"


def test_flips() -> None:
    x = tiny(train=200).train_x
    out = Augment((6, 4), shift=0, flip=True)(x, torch.Generator().manual_seed(0))
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(x, out, strict=True)])
    flipped = torch.tensor([torch.equal(a.flip(2), b) for a, b in zip(x, out, strict=True)])
    assert (kept ^ flipped).all()
    assert 60 < kept.sum() < 140


def test_mixup_blends_images_and_labels_alike() -> None:
    classes = 5
    y = torch.arange(50) % classes
    x = torch.nn.functional.one_hot(y, classes).float().view(50, 1, 1, classes)  # the image is its label
    augment = Augment((1, classes), shift=0, mixup=0.4)
    mixed, targets = augment.mix(x, y, classes, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed.flatten(1), targets)
    torch.testing.assert_close(targets.sum(1), torch.ones(50))
    share = 1 - targets.gather(1, y[:, None])
    assert share.max() <= 0.4 + 1e-6
    assert share.max() > 0.2


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_augmentation_depends_on_its_generator_alone(mixup: float) -> None:
    images = tiny()
    augment = Augment(images.size, shift=2, flip=True, mixup=mixup)

    def run(seed: int, global_seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        generator = torch.Generator().manual_seed(seed)
        x = augment(images.train_x, generator)
        out = x, *augment.mix(x, images.train_y, 5, generator)
        assert torch.equal(torch.get_rng_state(), state)
        return out

    for a, b, c in zip(run(0, 0), run(0, 1), run(1, 0), strict=True):
        assert torch.equal(a, b)
        if mixup or a.ndim == 4:
            assert not torch.equal(a, c)


def test_augmentation_suited_to_images(make_folder: MakeFolder, no_data: Path) -> None:
    write_fashion(no_data)
    settings = {
        name: (augment.shift, augment.flip, augment.mixup)
        for name in ("digits", "fashion-mnist", make_folder({"cat": 3, "dog": 3}, size=(16, 16)))
        for augment in [Augment.suited_to(load_images(name), mixup=0.2)]
    }
    assert list(settings.values()) == [(1, False, 0.2), (2, True, 0.2), (2, False, 0.2)]


def test_augment_refuses() -> None:
    with pytest.raises(ValueError, match="shift=-1"):
        Augment((6, 4), shift=-1)
    with pytest.raises(ValueError, match=r"mixup=1\.5"):
        Augment((6, 4), mixup=1.5)
    with pytest.raises(ValueError, match=re.escape("size (6, 4) got shape (2, 1, 4, 6)")):
        Augment((6, 4))(torch.zeros(2, 1, 4, 6), torch.Generator())


# --- batches


def test_batches_cover_each_epoch_once_and_drop_the_rest() -> None:
    images = tiny(train=50)
    drawn = list(batches(images, 16, epochs=2, seed=0))
    assert [x.shape for x, _ in drawn] == [(16, 48)] * 6
    epochs = [torch.cat([x[:, 0] for x, _ in drawn[i : i + 3]]) / 48 for i in (0, 3)]
    for rows in epochs:
        assert len(rows.unique()) == 48
    assert not torch.equal(*epochs)
    for x, y in drawn:
        rows = (x[:, 0] / 48).long()
        assert torch.equal(x, images.train_x[rows].flatten(1))
        assert torch.equal(y, images.train_y[rows])


def test_batches_depend_on_their_seed_alone() -> None:
    images = tiny()
    augment = Augment(images.size, flip=True, mixup=0.3)

    def run(seed: int) -> Tensor:
        torch.rand(seed + 3)  # moves the global generator on
        drawn = batches(images, 10, epochs=2, seed=seed, augment=augment)
        return torch.cat([torch.cat([x, y], 1) for x, y in drawn])

    assert run(0).shape == (100, 48 + 5)
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_each_batch_is_augmented_anew() -> None:
    images = tiny()
    images.train_x[:] = images.train_x[0].clone()
    first, second = batches(images, 50, epochs=2, seed=0, augment=Augment(images.size))
    assert not torch.equal(first[0], second[0])


def test_permutation_comes_after_augmentation() -> None:
    images = tiny()
    permutation = pixel_permutation(48, seed=1)
    assert permutation.sort().values.tolist() == list(range(48))
    assert torch.equal(permutation, pixel_permutation(48, seed=1))
    assert not torch.equal(permutation, pixel_permutation(48, seed=2))
    augment = Augment(images.size)
    plain = batches(images, 10, epochs=1, seed=0, augment=augment)
    permuted = batches(images, 10, epochs=1, seed=0, augment=augment, permutation=permutation)
    for (x, y), (shuffled, labels) in zip(plain, permuted, strict=True):
        assert torch.equal(x[:, permutation], shuffled)
        assert torch.equal(y, labels)


def test_batches_refuse_at_once() -> None:
    with pytest.raises(ValueError, match="batch_size=51: it must lie between 1 and the 50 training images"):
        batches(tiny(), 51, epochs=1, seed=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        batches(tiny(), 0, epochs=1, seed=0)
    with pytest.raises(ValueError, match="a permutation of 47 for images of 48 features"):
        batches(tiny(), 5, epochs=1, seed=0, permutation=pixel_permutation(47, 0))
