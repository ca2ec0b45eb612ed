"""Fashion-MNIST: where it is found, its download, damaged files."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.lab.data.samples import assert_standardised, write_fashion, write_idx

from einlinear_lab.data import load_images
from einlinear_lab.data.images.fashion_mnist import FILES, read_fashion_mnist
from einlinear_lab.data.paths import data_dir


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
    assert data_dir() == Path("/home/someone/.cache/einlinear")


def test_fashion_mnist_download_is_kept(no_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(**arguments: object) -> SimpleNamespace:
        calls.append(arguments)
        pixels = np.zeros((70_000, 784))
        pixels[0, 1] = pixels[60_000, 2] = 255
        return SimpleNamespace(data=pixels, target=np.array([str(i % 10) for i in range(70_000)]))

    monkeypatch.setattr("sklearn.datasets.fetch_openml", download)
    for _ in range(2):
        images = read_fashion_mnist()
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
    for name in FILES:
        write_fashion(no_data)
        (no_data / name).write_bytes(b"")
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
