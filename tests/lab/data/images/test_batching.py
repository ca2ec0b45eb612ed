"""Batches: shuffled, reproducible, augmented anew."""

from typing import Any

import pytest
import torch
from tests.lab.data.samples import tiny
from torch import Tensor

from einlinear_lab.data import Augment, Batches, Images, pixel_permutation
from einlinear_lab.data.sampling import torch_generator


def first(count: int, images: Images, *args: Any, **kw: Any) -> list[tuple[Tensor, Tensor]]:
    batches = Batches(images, *args, **kw)
    return [batches.batch(step) for step in range(count)]


def test_batches_cover_each_epoch_once_and_drop_the_rest() -> None:
    images = tiny(train=50)
    drawn = first(6, images, 16, seed=0)
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
        drawn = first(10, images, 10, seed=seed, augment=augment)
        return torch.cat([torch.cat([x, y], 1) for x, y in drawn])

    assert run(0).shape == (100, 48 + 5)
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_each_batch_is_augmented_anew() -> None:
    images = tiny()
    images.train_x[:] = images.train_x[0].clone()
    one, another = first(2, images, 50, seed=0, augment=Augment(images.size))
    assert not torch.equal(one[0], another[0])


def test_permutation_comes_after_augmentation() -> None:
    images = tiny()
    permutation = pixel_permutation(48, seed=1)
    assert permutation.sort().values.tolist() == list(range(48))
    assert torch.equal(permutation, pixel_permutation(48, seed=1))
    assert not torch.equal(permutation, pixel_permutation(48, seed=2))
    augment = Augment(images.size)
    plain = first(5, images, 10, seed=0, augment=augment)
    permuted = first(5, images, 10, seed=0, augment=augment, permutation=permutation)
    for (x, y), (shuffled, labels) in zip(plain, permuted, strict=True):
        assert torch.equal(x[:, permutation], shuffled)
        assert torch.equal(y, labels)


def test_images_keep_their_shape_for_models_that_take_them() -> None:
    images = tiny()
    for permutation in (None, pixel_permutation(48, seed=1)):
        (flat, y), (kept, labels) = (
            Batches(images, 10, seed=0, permutation=permutation, flatten=flatten).batch(0) for flatten in (True, False)
        )
        assert kept.shape == (10, 2, 6, 4)
        assert torch.equal(kept.flatten(1), flat)
        assert torch.equal(y, labels)


def test_a_sample_is_augmented_never_mixed_up_and_always_the_same() -> None:
    images = tiny(train=50)
    plain = list(Batches(images, 10, seed=0).sample(20, batch_size=8))
    assert [x.shape for x, _ in plain] == [(8, 48), (8, 48), (4, 48)]
    rows = torch.arange(20) * 50 // 20
    assert torch.equal(torch.cat([x for x, _ in plain]), images.train_x[rows].flatten(1))
    assert torch.equal(torch.cat([y for _, y in plain]), images.train_y[rows])
    assert sum(len(x) for x, _ in Batches(images, 10, seed=0).sample(999, batch_size=8)) == 50

    one, other = (
        list(Batches(images, 10, seed=seed, augment=Augment(images.size, mixup=mixup)).sample(20, 8))
        for seed, mixup in ((0, 0.0), (1, 0.5))
    )
    for (x, y), (z, labels), (before, _) in zip(one, other, plain, strict=True):
        assert torch.equal(x, z)
        assert torch.equal(y, labels)
        assert not torch.equal(x, before)


def test_batches_refuse_at_once() -> None:
    with pytest.raises(
        ValueError, match="batch_size=51 is more than the 50 training examples; give batch_size=50 or less"
    ):
        Batches(tiny(), 51, seed=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        Batches(tiny(), 0, seed=0)
    with pytest.raises(ValueError, match="a permutation of 47 for images of 48 features"):
        Batches(tiny(), 5, seed=0, permutation=pixel_permutation(47, 0))


def test_a_batch_depends_on_its_number_alone() -> None:
    images = tiny()
    options: dict[str, Any] = {"seed": 3, "augment": Augment(images.size, mixup=0.3)}
    in_order = first(12, images, 10, **options)
    batches = Batches(images, 10, **options)
    for step in (11, 0, 7):
        for found, expected in zip(batches.batch(step), in_order[step], strict=True):
            assert torch.equal(found, expected)


def test_generators_of_torch_differ_in_every_part() -> None:
    seeds = {torch_generator(*parts).initial_seed() for parts in ((0, 1), (1, 0), (0, 1, 1), (0, 1, 2), (10, 0))}
    assert len(seeds) == 5
