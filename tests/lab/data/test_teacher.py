"""Synthetic regression: a random network, fresh data at every step."""

import math

import pytest
import torch

from einlinear_lab.data import Teacher


def test_the_function_is_that_of_the_description() -> None:
    teacher = Teacher(width=32)
    x, y = teacher.batch(50, seed=1, step=2)
    assert (x.shape, y.shape) == ((50, 8), (50, 1))
    assert x.dtype == y.dtype == torch.float32
    assert not y.requires_grad
    h = x.double()
    *hidden, last = (weight.double() for weight in teacher._weights)
    assert [weight.shape for weight in hidden] == [(32, 8), *5 * [(32, 32)]]
    for weight in hidden:
        h = torch.relu(h @ weight.T) * math.sqrt(2)
    raw = h @ last.T
    slope = (y[1:] - y[:-1]).double() / (raw[1:] - raw[:-1])
    torch.testing.assert_close(slope, slope[:1].expand(49, 1), rtol=1e-3, atol=0)


def test_outputs_are_standardised_and_activations_keep_their_size() -> None:
    teacher = Teacher(width=256)
    x, y = teacher.evaluation(8000)
    assert abs(y.mean()) < 0.1
    assert y.std() == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(x.mean(0), torch.zeros(8), atol=0.05, rtol=0)
    torch.testing.assert_close(x.T @ x / len(x), torch.eye(8), atol=0.06, rtol=0)
    h = x
    for weight in teacher._weights[:-1]:
        h = (h @ weight.T).relu() * math.sqrt(2)
        assert 0.5 < h.square().mean() < 2


def test_any_batch_by_its_number() -> None:
    teacher = Teacher(width=16)
    first = [teacher.batch(5, seed=0, step=step) for step in range(4)]
    again = Teacher(width=16)
    for step in (3, 0, 2):
        for a, b in zip(again.batch(5, seed=0, step=step), first[step], strict=True):
            assert torch.equal(a, b)
    different = [x for x, _ in first] + [teacher.batch(5, seed=1, step=0)[0], teacher.evaluation(5)[0]]
    assert len({x.numpy().tobytes() for x in different}) == 6
    assert torch.equal(teacher.evaluation(5)[1], again.evaluation(5)[1])
    assert not torch.equal(Teacher(width=16, seed=1)(first[0][0]), first[0][1])


def test_what_is_refused() -> None:
    for name in ("features", "width", "depth"):
        with pytest.raises(ValueError, match=f"{name}=0: it must be at least 1"):
            Teacher(**{name: 0})
    teacher = Teacher(width=4)
    with pytest.raises(ValueError, match="batch_size=0"):
        teacher.batch(0, seed=0, step=0)
    with pytest.raises(ValueError, match="step=-1"):
        teacher.batch(1, seed=0, step=-1)
    with pytest.raises(ValueError, match="seed=-1"):
        Teacher(seed=-1)
