"""Output metric: which directions of a layer's outputs change the model's output most.

With the gradients g, at the layer's outputs, of random projections of the model's output, or for logits of the
log-likelihoods of tokens that the model draws, and G = E[g g^T], a small error e of the layer's outputs changes the
model's output in proportion to tr(G E[e e^T]). Fits of W by V for inputs with the second moment C minimise
tr(G (W - V) C (W - V)^T).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear import ops
from einlinear.compression.activations import hooked, output_of, tokens_of
from einlinear.compression.block_checkpointing import checkpointed_blocks
from einlinear.compression.calibration import InputStatistics, spread_numbers
from einlinear.nn.dense_layers import features
from einlinear.nn.model_call import Batch, call, frozen
from einlinear.ops.projection.svd import count, merge, unmerge
from einlinear.ops.reference import einsum
from einlinear.structures import Structure

# gradients, one a token, after which G changes little: for each output feature, and for a diagonal
_GRADIENTS_PER_OUTPUT, _GRADIENTS_FOR_DIAGONAL = 16, 1024
# the most batches, and the most entries of the output of each that are projected
_BATCHES, _ENTRIES = 12, 2**19
# fraction of the mean of G's diagonal that is added to it, since few gradients say little of many directions
_DAMPING = 1e-2


@dataclass(frozen=True)
class OutputMetric:
    """G of a layer, (out, out), or its diagonal, (out,)."""

    gradient_moment: Tensor

    def factored(self, structure: Structure | None = None) -> tuple[Tensor, Tensor]:
        """Return roots of G and their inverses, (1, out, out) or (1, out, 1).

        With a structure, only the blocks of G count that its last factor mixes, (blocks, n, n) or (blocks, n, 1).
        """
        g = self.gradient_moment.double()
        is_diagonal = g.dim() == 1
        mean = g.mean() if is_diagonal else g.diagonal().mean()
        g = g / mean
        if structure is not None and (added := _padded_outputs(structure) - structure.out_features):
            g = F.pad(g, (0, added) if is_diagonal else (0, added, 0, added))
        g = g + _DAMPING * (torch.ones_like(g) if is_diagonal else torch.eye(len(g)).to(g))
        if is_diagonal:
            blocks = g[None, :, None] if structure is None else _by_block(structure, g[:, None])
            return blocks.sqrt(), blocks.rsqrt()
        variances, directions = torch.linalg.eigh(g[None] if structure is None else _diagonal_blocks(structure, g))
        # all are at least the damping but for rounding
        root = variances.clamp(min=_DAMPING / 2).sqrt()[:, None]
        return (directions * root) @ directions.mT, (directions / root) @ directions.mT


def fit_metric(statistics: InputStatistics, get_metric: Callable[[], OutputMetric | None]) -> OutputMetric | None:
    """Return the metric to fit a layer in: of a table of embeddings its tokens' frequencies, else that of gradients."""
    return get_metric() if statistics.frequencies is None else OutputMetric(statistics.frequencies)


def apply_roots(roots: Tensor, matrices: Tensor) -> Tensor:
    """Multiply matrices by roots, which may be diagonal."""
    roots = roots.to(matrices.dtype)
    return roots * matrices if roots.shape[2] == 1 else roots @ matrices


@torch.no_grad()
def project_in_metric(
    structure: Structure,
    weight: Tensor,
    input_moment: Tensor | None,
    metric: OutputMetric | None,
    steps: int | None = None,
) -> list[Tensor]:
    """Return the factors of `ops.project` in an output metric, as far as the last factor can absorb its inverse.

    Those of stacked weights (experts, out, in), with input second moments (experts, in, in), are stacked.
    """
    if weight.dim() == 3:
        moments = [None] * len(weight) if input_moment is None else input_moment.expand(len(weight), -1, -1)
        by_expert = [project_in_metric(structure, w, c, metric, steps) for w, c in zip(weight, moments, strict=True)]
        return [torch.stack(factors) for factors in zip(*by_expert, strict=True)]
    term = structure.terms[0]
    last, sizes = term.factors[-1], dict(structure.sizes)
    is_alone = len(structure.terms) == 1 and not {*term.inputs} & {*term.outputs}
    if metric is None or last.free or not is_alone:
        return ops.project(structure, weight, input_moment, steps)
    root, inverse = metric.factored(structure)
    padded = F.pad(weight.double(), (0, 0, 0, _padded_outputs(structure) - structure.out_features))
    weighted = apply_roots(root, _by_block(structure, padded))
    axes, with_features = (*term.outputs, "feature"), {**sizes, "feature": structure.in_features}
    matrix = unmerge(weighted, (last.batch, last.new, ("feature",)), axes, with_features)
    matrix = matrix.reshape(padded.shape)[: structure.out_features]
    matrix = matrix.to(torch.promote_types(weight.dtype, torch.float32))
    *others, factor = ops.project(structure, matrix, input_moment, steps)
    groups = last.batch, last.new, last.contracted
    return [*others, unmerge(apply_roots(inverse, merge(factor, last.axes, groups)), groups, last.axes, sizes)]


def dense_weights(structure: Structure, factors: Sequence[Tensor]) -> Tensor:
    """Return the matrix of factors, or the matrices of stacked ones, (experts, out, in)."""
    if factors[0].dim() == len(structure.shapes[0]):
        return ops.dense_weight(structure, factors)
    return torch.stack([ops.dense_weight(structure, each) for each in zip(*factors, strict=True)])


def _padded_outputs(structure: Structure) -> int:
    return count(structure.terms[0].outputs, dict(structure.sizes))


def _by_block(structure: Structure, matrix: Tensor) -> Tensor:
    """Return the rows of a matrix, (out, n), by the blocks that the last factor mixes, (blocks, rows, n)."""
    (term,), sizes = structure.terms, dict(structure.sizes)
    last, shape = term.factors[-1], [sizes[axis] for axis in term.outputs]
    by_axes = matrix.reshape([*shape, matrix.shape[1]])
    return merge(by_axes, (*term.outputs, "feature"), (last.batch, last.new, ("feature",)))


def _diagonal_blocks(structure: Structure, g: Tensor) -> Tensor:
    (term,), sizes = structure.terms, dict(structure.sizes)
    last, shape = term.factors[-1], [sizes[axis] for axis in term.outputs]
    other = tuple(axis if axis in last.batch else f"{axis}'" for axis in term.outputs)
    result = (*last.batch, *last.new, *(f"{axis}'" for axis in last.new))
    return einsum([(*term.outputs, *other)], result, g.reshape(shape * 2)).reshape(-1, last.fan_out, last.fan_out)


def measure_output_metrics(
    model: nn.Module,
    layers: Mapping[str, Any],
    batches: Sequence[Batch],
    copy: Callable[[Tensor], Tensor] = lambda moment: moment,
) -> dict[str, OutputMetric]:
    """Run a few batches forwards and backwards; layers without gradients have no metric.

    G is measured in full for layers with at most as many outputs as inputs, and its diagonal for others. Of the sums
    so far, those that `copy` returns are kept.
    """
    with frozen(model.parameters()):
        try:
            with checkpointed_blocks(model):
                moments = _gradient_moments(model, layers, batches, copy)
        except (OSError, torch.OutOfMemoryError):
            raise
        # a block that changes what it is given, or that remembers its calls, cannot be run again: it raises anything
        except Exception:
            moments = _gradient_moments(model, layers, batches, copy)
    return {name: OutputMetric(g) for name, g in moments.items() if g.isfinite().all() and float(g.sum()) > 0}


def _gradient_moments(
    model: nn.Module, layers: Mapping[str, Any], batches: Sequence[Batch], copy: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    moments, tokens = dict[str, Tensor](), dict.fromkeys(layers, 0)
    generator = torch.Generator().manual_seed(0)

    def record(batch: Batch, name: str, _: Any, output: Tensor) -> Tensor:
        def add(gradient: Tensor) -> None:
            g = tokens_of(batch, gradient).float()
            moment = g.T @ g if _is_full(layers[name]) else g.square().sum(0)
            moments[name] = copy(moment + moments[name] if name in moments else moment)
            tokens[name] += len(g)

        output.requires_grad_().register_hook(add)
        # a clone: an operation in place may follow
        return output.clone()

    for number in spread_numbers(len(batches))[:_BATCHES]:
        batch = batches[number]
        with torch.enable_grad(), hooked(layers, partial(record, batch)):
            result = call(model, batch)
            output = tokens_of(batch, output_of(result))
            if output.requires_grad:
                most = max(1, _ENTRIES // output.shape[-1])
                rows = torch.randperm(len(output), generator=generator)[:most].to(output.device)
                chosen, is_logits = output[rows], hasattr(result, "logits")
                # the gradient takes as much memory as the output
                del result, output
                chosen.backward(_direction(chosen, is_logits, generator))
        if all(tokens[name] >= _enough(layer) for name, layer in layers.items()):
            break
    return moments


def _is_full(layer: Any) -> bool:
    in_features, out_features = features(layer)
    return out_features <= in_features


def _enough(layer: Any) -> int:
    return _GRADIENTS_PER_OUTPUT * features(layer)[1] if _is_full(layer) else _GRADIENTS_FOR_DIAGONAL


@torch.no_grad()
def _direction(output: Tensor, is_logits: bool, generator: torch.Generator) -> Tensor:
    """Return a random direction of outputs, (tokens, features): for logits, the gradient of a drawn token's likelihood.

    Gradients of these are the square root of the Fisher information, the others that of the squared distance.
    """
    if not is_logits or output.shape[-1] == 1:
        return torch.randn(output.shape, generator=generator).to(output)
    p = output.float().softmax(1)
    drawn = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
    return p.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=p.dtype)).to(output.dtype)
