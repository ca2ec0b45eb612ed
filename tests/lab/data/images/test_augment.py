"""Shifts, flips and mixup."""

import re
from pathlib import Path

import pytest
import torch
from tests.lab.data.samples import MakeFolder, tiny, write_fashion
from torch import Tensor

from einlinear_lab.data import Augment, load_images


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


def test_augmentation_is_that_of_earlier_runs() -> None:
    """Pixels, pairs and shares as kornia 0.9 drew them, so that experiments can be repeated."""
    images, generator = tiny(train=7), torch.Generator().manual_seed(0)
    augment = Augment(images.size, shift=2, flip=True, mixup=0.5)
    moved = augment(images.train_x, generator)[:, 0, 2, 1] - images.train_x[:, 0, 0, 0]
    assert moved.tolist() == [15, 8, 19, 0, 13, 4, 17]
    x, targets = augment.mix(images.train_x, torch.arange(7), 7, generator)
    own = [0.562, 0.732, 0.756, 0.708, 0.615, 0.818, 1.0]
    torch.testing.assert_close(targets.diagonal(), torch.tensor(own), atol=1e-3, rtol=0)
    torch.testing.assert_close(x[:, 0, 0, 0], targets @ images.train_x[:, 0, 0, 0])


def test_augmentation_suited_to_images(make_folder: MakeFolder, no_data: Path) -> None:
    write_fashion(no_data)
    settings = {
        name: (augment.shift, augment.flip, augment.mixup)
        for name in (
            "digits",
            "fashion-mnist",
            make_folder({"cat": 3, "dog": 3}, size=(16, 16), at="mine/fashion-mnist"),
        )
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
