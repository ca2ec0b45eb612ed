"""How much an error of each layer's outputs changes what the model puts out, to first order.

If the outputs y of a layer are off by d, those of the model are off by J d, with J the Jacobian. For a d of which only
the size is known, E|J d|^2 is |d|^2 times the mean square of J's entries, and these are what random directions show: of
a model that puts out logits, the gradients of the logarithm of the probability of labels that it draws itself (whose
mean square is the curvature of the divergence between its answers and those of a changed model); of another, those of a
random projection of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.compression.running import Batch, call, hooked, output_of, tokens_of


def importance(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Batch]) -> dict[str, float]:
    """For every layer that the output depends on, the sum over tokens of the mean square of the gradients there.

    Tokens are summed over, so that a layer that few tokens pass, such as one that reads the first of a sequence alone,
    counts for these few. No gradient is kept, nor are those of parameters computed.
    """
    totals: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad(), _frozen(model):
        for batch in batches:

            def add(gradient: Tensor, name: str, batch: Batch = batch) -> None:
                own = tokens_of(batch, gradient).float()
                totals[name] = totals.get(name, 0.0) + float(own.square().mean(1).sum())

            def note(name: str, output: Tensor, add: Callable[..., None] = add) -> Tensor:
                output.requires_grad_().register_hook(partial(add, name=name))
                return output.clone()  # what is done to it in place is no output of the layer

            with hooked(layers, note):
                result = call(model, batch)
            loss = _probe(output_of(result), batch, logits=hasattr(result, "logits"), generator=generator)
            if loss.requires_grad:
                loss.backward()
    return totals


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters need no gradients."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_()


def _probe(output: Tensor, batch: Batch, logits: bool, generator: torch.Generator) -> Tensor:
    """A scalar whose gradient at the outputs is a random direction of the right distribution."""
    flat = tokens_of(batch, output).float()
    if logits and flat.shape[1] > 1:
        drawn = torch.multinomial(flat.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
        return F.cross_entropy(flat, drawn.to(flat.device), reduction="sum")
    signs = torch.randn(flat.shape, generator=generator).to(flat.device)
    return (flat * signs).sum()
