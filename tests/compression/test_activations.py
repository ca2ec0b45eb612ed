"""What is read off a model: the output that counts, and tokens without padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einlinear.compression.activations import output_of, tokens_of
from einlinear.compression.divergence import slices

X, Y = torch.randn(4, 6), torch.randn(4, 6)


class Output(dict[str, Tensor]):
    """As transformers has them."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (X, X),
        ((torch.arange(3), X, Y), X),
        (Output(loss=X.mean(), logits=X, hidden=Y), X),
        (Output(last_hidden_state=X, pooler_output=Y), X),
        (Output(loss=X.mean(), start_logits=X, end_logits=Y), torch.stack([X, Y])),
        ({"loss": X.mean(), "y": Y}, Y),
    ],
)
def test_the_output_that_counts(result: object, expected: Tensor) -> None:
    assert torch.equal(output_of(result), expected)


def test_no_output() -> None:
    with pytest.raises(ValueError, match="returns a dict, which holds no tensor"):
        output_of({"loss": X.mean()})


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        ((2, 6, 3), 7),  # (batch, tokens, features)
        ((12, 3), 7),  # flattened
        ((6, 2, 3), 12),  # of something else: nothing is known of it
        ((4, 3, 3), 12),
        ((2, 5, 3), 10),
    ],
)
def test_padding_is_left_out(shape: tuple[int, ...], tokens: int) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]])
    x = torch.randn(shape)
    found = tokens_of({"attention_mask": mask}, x)
    assert found.shape == (tokens, 3)
    if tokens == 7:
        assert torch.equal(found, x.reshape(12, 3)[mask.flatten().bool()])


def test_slices_of_tokens() -> None:
    assert [(part.start, part.stop) for part in slices(5, 2**17)] == [(0, 2), (2, 4), (4, 5)]
