"""A machine without data, and a folder of images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.lab.data.samples import MakeFolder

from einlinear_lab.data.images import fashion_mnist


@pytest.fixture(autouse=True)
def no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without Fashion-MNIST and without internet; returns the folder where fetched data belongs."""

    def offline(**_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("EINLINEAR_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", tmp_path / "system")
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
