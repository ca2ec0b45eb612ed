"""Batches: shuffled, reproducible, augmented anew."""

import pytest
import torch
from tests.data.samples import tiny
from torch import Tensor

from einlinear.data import Augment, batches, pixel_permutation


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
