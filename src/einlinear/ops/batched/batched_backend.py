"""The batched-matmul backend: one strided matmul per factor, forward and backward, as `plan` says.

A step multiplies a factor (batch, new, contracted) with an intermediate (batch, contracted, free). It is copied first
unless the axes of each group are neighbours. The plan minimises MACs and copies over orders and layouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops import reference
from einlinear.ops.operands import Assignment, Gradients, Product
from einlinear.structures import Structure, Term
from einlinear.structures.pattern import Axes

# the axis of the tokens; no axis of a pattern has this name
TOKENS = ""
# candidates for the layout after every step; MACs that take as long as copying an element does
_MAX_LAYOUTS, _COPY = 16, 16


def unsupported(structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why this backend cannot run, or None if it can."""
    why = f"it computes with real numbers, not with {str(dtype).removeprefix('torch.')}"
    return None if dtype.is_floating_point else why


def forward(product: Product, save: bool) -> tuple[Tensor, list[Tensor]]:
    """Return y of shape (n, out_features), and the intermediates if they are to be saved."""
    structure, factors, x, bias, routing = product
    if routing is not None:
        y = x.new_zeros(x.shape[0], structure.out_features) if bias is None else bias.repeat(x.shape[0], 1)
        for _, _, tokens, expert in _experts(product, routing):
            y.index_add_(0, tokens, forward(expert, False)[0])
        return y, []
    sizes = {**dict(structure.sizes), TOKENS: x.shape[0]}
    total: Tensor | None = None
    intermediates: list[Tensor] = []
    for steps in plan(structure):
        z = _token_major(x, steps[0].source, sizes)
        for step in steps:
            if save and step is not steps[0]:
                intermediates.append(z)
            z = _next(factors, step, z, sizes)
        output = z.reshape(x.shape[0], math.prod(z.shape[1:]))[:, : structure.out_features]
        total = output if total is None else total.add_(output)
    assert total is not None
    # nothing else uses this memory, so it is handed out as no view of anything: activations may then overwrite it
    y = torch.ops.aten._unsafe_view(total.contiguous(), (x.shape[0], structure.out_features))
    return y if bias is None else y.add_(bias), intermediates


def backward(
    product: Product, grad: Tensor, saved: Sequence[Tensor], needs_x: bool, needs_factors: Sequence[bool]
) -> Gradients:
    """Return the gradients that are needed; without saved intermediates these are recomputed."""
    structure, factors, x, _, routing = product
    if routing is not None:
        return _backward_routed(product, routing, grad, needs_x, needs_factors)
    sizes = {**dict(structure.sizes), TOKENS: x.shape[0]}
    grad_x: Tensor | None = None
    grad_factors: list[Tensor | None] = [None] * len(factors)
    remaining = iter(saved)
    for steps in plan(structure):
        # the input of every step
        inputs = [_token_major(x, steps[0].source, sizes)]
        for position, step in enumerate(steps[:-1]):
            if saved:
                inputs.append(next(remaining))
            elif any(needs_factors[s.index] for s in steps[position + 1 :]):
                inputs.append(_next(factors, step, inputs[-1], sizes))
        g = _token_major(grad, steps[-1].result, sizes)
        for position in reversed(range(len(steps))):
            step = steps[position]
            g3 = g if step.plain else _merge(g, step.result, (step.batch, step.new, step.free), sizes)
            if needs_factors[step.index]:
                grad_factors[step.index] = _grad_factor(step, g, g3, inputs[position], sizes)
            if not (needs_x or any(needs_factors[s.index] for s in steps[:position])):
                break
            if step.plain:
                g = g @ factors[step.index]
            else:
                w = _weight(factors[step.index], step, sizes).transpose(1, 2)
                g = _product(w, g3, (step.batch, step.contracted, step.free), step.source, sizes)
        else:
            grad_term = g.reshape(x.shape[0], math.prod(g.shape[1:]))[:, : structure.in_features]
            grad_x = grad_term if grad_x is None else grad_x.add_(grad_term)
    return Gradients(grad_x, None, grad_factors)


def _backward_routed(
    product: Product, routing: Assignment, grad: Tensor, needs_x: bool, needs_factors: Sequence[bool]
) -> Gradients:
    tensors, needed = (product.x, routing.gates, *product.factors), (needs_x, needs_x, *needs_factors)
    # zeros for tokens and experts without any pair
    zeros = partial(torch.zeros_like, memory_format=torch.contiguous_format)
    grad_x, grad_gates, *grad_factors = (zeros(t) if needs else None for t, needs in zip(tensors, needed, strict=True))
    for e, pairs, tokens, expert in _experts(product, routing):
        gradients = backward(expert, grad[tokens], [], needs_x, needs_factors)
        if grad_x is not None and grad_gates is not None and gradients.x is not None:
            grad_x.index_add_(0, tokens, gradients.x * routing.gates.flatten()[pairs, None])
            grad_gates.view(-1)[pairs] = (gradients.x * product.x[tokens]).sum(1)
        for stack, grad_factor in zip(grad_factors, gradients.factors, strict=True):
            if stack is not None and grad_factor is not None:
                stack[e] = grad_factor
    return Gradients(grad_x, grad_gates, grad_factors)


def _experts(product: Product, routing: Assignment) -> Iterator[tuple[int, Tensor, Tensor, Product]]:
    """Yield the number, the pairs, the tokens and the product of every expert that has tokens."""
    structure, factors, x, _, _ = product
    flat = routing.indices.flatten()
    pairs_of = flat.argsort(stable=True).split(torch.bincount(flat, minlength=product.experts).tolist())
    for e, pairs in enumerate(pairs_of):
        if len(pairs):
            tokens, gates = pairs // routing.indices.shape[1], routing.gates.flatten()[pairs, None]
            yield e, pairs, tokens, Product(structure, [f[e] for f in factors], x[tokens] * gates)


def _next(factors: Sequence[Tensor], step: Step, z: Tensor, sizes: dict[str, int]) -> Tensor:
    """Return the intermediate after a step."""
    if step.plain:
        return F.linear(z, factors[step.index])
    w = _weight(factors[step.index], step, sizes)
    z3 = _merge(z, step.source, (step.batch, step.contracted, step.free), sizes)
    return _product(w, z3, (step.batch, step.new, step.free), step.result, sizes)


def _grad_factor(step: Step, g: Tensor, g3: Tensor, z: Tensor, sizes: dict[str, int]) -> Tensor:
    if step.plain:
        return g.T @ z
    batch, free = step.batch, step.free
    if step.repeats:
        batch, free = (), step.batch + step.free
        g3 = _merge(g, step.result, (batch, step.new, free), sizes)
    z3 = _merge(z, step.source, (batch, free, step.contracted), sizes)
    return _product(g3, z3, (batch, step.new, step.contracted), step.factor, sizes)


def _token_major(x: Tensor, axes: Axes, sizes: dict[str, int]) -> Tensor:
    """Return (n, features) padded and viewed with one dimension per axis."""
    shape = [sizes[a] for a in axes]
    return reference.pad(x, math.prod(shape[1:])).reshape(shape)


def _weight(factor: Tensor, step: Step, sizes: dict[str, int]) -> Tensor:
    """Return the factor as (batch, new, contracted)."""
    w = _merge(factor, step.factor, (() if step.repeats else step.batch, step.new, step.contracted), sizes)
    return w.expand(math.prod(sizes[a] for a in step.batch), -1, -1) if step.repeats else w


def _merge(tensor: Tensor, axes: Axes, groups: tuple[Axes, Axes, Axes], sizes: dict[str, int]) -> Tensor:
    """Return a three-dimensional tensor, one dimension per group: a view where strides allow it."""
    shape = [math.prod(sizes[a] for a in group) for group in groups]
    return tensor.permute([axes.index(a) for group in groups for a in group]).reshape(shape)


def _product(a: Tensor, b: Tensor, groups: tuple[Axes, Axes, Axes], layout: Axes, sizes: dict[str, int]) -> Tensor:
    """Return the batched product, with the axes of the groups as the layout, also in memory if possible."""
    if all(is_run(group, layout) for group in groups):
        y = a.new_empty([sizes[axis] for axis in layout])
        torch.bmm(a, b, out=_merge(y, layout, groups, sizes))
        return y
    axes = groups[0] + groups[1] + groups[2]
    return torch.bmm(a, b).view([sizes[axis] for axis in axes]).permute([axes.index(axis) for axis in layout])


@dataclass(frozen=True)
class Step:
    """The contraction of `Structure.factors[index]`: its groups of axes, and layouts from the slowest axis on."""

    index: int
    factor: Axes
    # shared by factor and input, and kept by the output; or axes over which the factor is repeated
    batch: Axes
    contracted: Axes
    # the tokens among them
    free: Axes
    new: Axes
    source: Axes
    result: Axes
    # MACs and copied elements for one token
    cost: int
    copied: int

    @property
    def repeats(self) -> bool:
        """Whether the same matrix multiplies every batch entry."""
        return bool(self.batch) and self.batch[0] not in self.factor

    @cached_property
    def plain(self) -> bool:
        """Whether the step is a product of one matrix with contiguous vectors, as in `F.linear`."""
        ends = (TOKENS, *self.contracted), (TOKENS, *self.new), (*self.new, *self.contracted)
        return ends == (self.source, self.result, self.factor) and len(self.factor) == 2

    def __str__(self) -> str:
        def text(axes: Axes) -> str:
            return " ".join(axis or "tokens" for axis in axes) or "1"

        groups = ", ".join(f"{name} ({text(getattr(self, name))})" for name in ("batch", "contracted", "free", "new"))
        copies = f", copies {self.copied:,} elements a token" if self.copied else ""
        return f"{groups}: ({text(self.source)}) -> ({text(self.result)}){copies}"


@lru_cache(maxsize=4096)
def plan(structure: Structure) -> tuple[tuple[Step, ...], ...]:
    """Return the steps of every term; the first reads and the last writes token-major.

    >>> import einlinear as el
    >>> for step in plan(el.structure("btt", 64, 64))[0]:
    ...     print(step)
    batch (g), contracted (a), free (tokens), new (r f): (tokens g a) -> (g r f tokens)
    batch (f), contracted (g r), free (tokens), new (e): (g r f tokens) -> (tokens f e)
    """
    sizes, numbered = dict(structure.sizes), range(len(structure.factors))
    return tuple(_plan_term(term, numbers[0], sizes) for term, numbers in structure.by_term(numbered))


def is_run(group: Axes, layout: Axes) -> bool:
    """Return whether the axes are neighbours, in this order, in the layout: then merging them is a view."""
    return not group or group == layout[layout.index(group[0]) :][: len(group)]


def _plan_term(term: Term, first: int, sizes: Mapping[str, int]) -> tuple[Step, ...]:
    count = len(term.factors)
    # with many factors, the order with the fewest MACs is the only candidate
    orders = permutations(range(count)) if count <= 3 else iter([tuple(range(count))])
    plans = (_best_layouts(term, order, first, sizes) for order in orders)
    # the first of equals is the usual order
    return min(plans, key=lambda steps: sum(step.cost for step in steps))


def _best_layouts(term: Term, order: Sequence[int], first: int, sizes: Mapping[str, int]) -> tuple[Step, ...]:
    """Return the cheapest steps in an order: a shortest path through the layouts of the intermediates."""
    paths: dict[Axes, tuple[int, tuple[Step, ...]]] = {(TOKENS, *term.inputs): (0, ())}
    for position, index in enumerate(order):
        axes = term.factors[index].axes
        later = {axis for i in order[position + 1 :] for axis in term.factors[i].axes} | set(term.outputs)
        next_axes = term.factors[order[position + 1]].axes if position + 1 < len(order) else ()
        longer: dict[Axes, tuple[int, tuple[Step, ...]]] = {}
        for source, (cost, steps) in paths.items():
            results = _layouts(source, axes, next_axes, later) if next_axes else [(TOKENS, *term.outputs)]
            for result in results:
                for step in _steps(first + index, axes, source, result, later, sizes):
                    total = cost + step.cost
                    if result not in longer or total < longer[result][0]:
                        longer[result] = total, (*steps, step)
        paths = dict(sorted(longer.items(), key=lambda path: path[1][0])[:_MAX_LAYOUTS])
    return min(paths.values(), key=lambda path: path[0])[1]


def _layouts(source: Axes, factor: Axes, next_factor: Axes, later: set[str]) -> Iterator[Axes]:
    """Yield layouts for the output of a step: its groups of axes in any order, tokens last or first."""
    remaining = [axis for axis in source if axis != TOKENS and axis in later]
    batch, free = [a for a in remaining if a in factor], [a for a in remaining if a not in factor]
    new = [axis for axis in factor if axis not in source]
    # axes that the next step treats alike stay together
    halves = [tuple(a for a in g if (a in next_factor) == both) for g in (batch, new, free) for both in (True, False)]
    groups = [half for half in halves if half]
    # with many axes, only the order in which they come
    for order in [groups] if len(groups) > 5 else permutations(groups):
        merged = tuple(axis for group in order for axis in group)
        yield from ((*merged, TOKENS), (TOKENS, *merged)) if batch else ((TOKENS, *merged), (*merged, TOKENS))


def _steps(
    index: int, factor: Axes, source: Axes, result: Axes, later: set[str], sizes: Mapping[str, int]
) -> Iterator[Step]:
    """Yield the steps between two layouts; every group in the order in which it lies in memory, so that it merges."""
    batch = tuple(a for a in source if a in factor and a in later)
    contracted = tuple(a for a in source if a in factor and a not in later)
    free = tuple(a for a in result if a in source and a not in factor)
    new = tuple(a for a in result if a not in source)
    macs = math.prod(sizes[a] for a in (*batch, *contracted, *free, *new) if a != TOKENS)
    choices = [(batch, free)]
    if not batch and len(free) > 1 and free[0] == TOKENS:
        # one product per token
        choices.append((free[:1], free[1:]))
    for batch, free in choices:
        copied = 0
        for layout, groups in ((source, (batch, contracted, free)), (result, (batch, free, new))):
            if not all(is_run(group, layout) for group in groups):
                copied += math.prod(sizes[a] for a in layout if a != TOKENS)
        yield Step(index, factor, batch, contracted, free, new, source, result, macs + _COPY * copied, copied)
