"""Images as sequences of pixels."""

from dataclasses import replace

import pytest
import torch
from tests.lab.data.samples import tiny

from einlinear_lab.data import Images, PixelSequences, load_images
from einlinear_lab.data.images.load import _standardised
from einlinear_lab.data.sequences import BOS


def photographs(train: int = 12, test: int = 5, size: int = 4) -> tuple[Images, torch.Tensor]:
    """Random colours, standardised as `load_images` does, and their 8-bit values, which use the whole range."""
    levels = torch.randint(0, 256, (train + test, 3, size, size), generator=torch.Generator().manual_seed(0))
    levels[0, :, 0, 0], levels[1, :, 0, 0] = 0, 255
    x, y = levels.float() / 255, torch.zeros(train + test, dtype=torch.int64)
    images = Images("made up", "made up", x[:train], y[:train], x[train:], y[train:], ("a",))
    return _standardised(images), levels


def test_tokens_are_the_8_bits_channel_by_channel() -> None:
    images, levels = photographs()
    data = PixelSequences(images, size=None, batch_size=12, seed=0)
    assert (data.vocab_size, data.context) == (257, 4 * 4 * 3)
    expected = levels.permute(0, 2, 3, 1).reshape(len(levels), -1)  # rows, columns, channels
    x, y = data.batch(0)
    assert x.dtype == y.dtype == torch.int64
    assert {tuple(row) for row in y.tolist()} == {tuple(row) for row in expected[:12].tolist()}
    assert (x[:, 0] == BOS).all()
    assert torch.equal(x[:, 1:], y[:, :-1])
    ((x, y),) = PixelSequences(images, size=None, batch_size=12, seed=0).evaluation()
    assert torch.equal(y, expected[12:])
    assert (x[:, 0] == BOS).all()


def test_resized_to_8x8() -> None:
    images, _ = photographs(size=32)
    data = PixelSequences(images, batch_size=2, seed=0)
    assert data.context == 8 * 8 * 3 == 192
    flat = replace(images, train_x=images.train_x.amin((2, 3), keepdim=True).expand(-1, -1, 32, 32).contiguous())
    _, y = PixelSequences(flat, batch_size=2, seed=0).batch(0)
    assert torch.equal(y.view(2, 64, 3), y.view(2, 64, 3)[:, :1].expand(-1, 64, -1)), "a plain image stays plain"


def test_grey_images_and_test_pixels_beyond_the_training_range() -> None:
    images = load_images("digits")
    data = PixelSequences(images, batch_size=7, seed=1)
    assert data.context == 64
    assert data.batch(5)[1].max() <= 255
    images = tiny()
    images.test_x[0, 0, 0, 0] = -1e9
    images.test_x[0, 0, 0, 1] = 1e9
    ((_, y),) = PixelSequences(images, size=None, batch_size=3, seed=0).evaluation()
    assert y[0, [0, 2]].tolist() == [0, 255]


def test_a_channel_without_contrast() -> None:
    images, _ = photographs()
    images.train_x[:, 1] = images.test_x[:, 1] = 0.25
    _, y = PixelSequences(images, size=None, batch_size=4, seed=0).batch(0)
    assert (y[:, 1::3] == 0).all()
    assert (y[:, ::3] > 0).any()


def test_any_batch_by_its_number_and_every_image_once_an_epoch() -> None:
    images, _ = photographs(train=13)
    data = PixelSequences(images, size=None, batch_size=4, seed=0)
    batches = [data.batch(step)[1] for step in range(9)]
    for epoch in range(3):
        rows = torch.cat(batches[3 * epoch : 3 * epoch + 3])
        assert len(rows.unique(dim=0)) == 12
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:6]))
    again = PixelSequences(images, size=None, batch_size=4, seed=0)
    for step in (8, 0, 4, 8):
        assert torch.equal(again.batch(step)[1], batches[step])
    other = PixelSequences(images, size=None, batch_size=4, seed=1)
    assert not torch.equal(other.batch(0)[1], batches[0])


def test_what_is_refused() -> None:
    images, _ = photographs()
    with pytest.raises(ValueError, match="size=0: it must be at least 1 pixel"):
        PixelSequences(images, size=0, batch_size=1, seed=0)
    with pytest.raises(
        ValueError, match="batch_size=13 is more than the 12 training examples; give batch_size=12 or less"
    ):
        PixelSequences(images, batch_size=13, seed=0)
    with pytest.raises(ValueError, match="batch_size=0: it must be at least 1"):
        PixelSequences(images, batch_size=0, seed=0)
    with pytest.raises(ValueError, match="step=-1: it must"):
        PixelSequences(images, batch_size=4, seed=0).batch(-1)
    with pytest.raises(ValueError, match="count=0"):
        PixelSequences(images, batch_size=4, seed=0).evaluation(0)
