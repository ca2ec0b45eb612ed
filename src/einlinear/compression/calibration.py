"""Calibration: second moments of the inputs of a model's layers tell how close another layer's outputs come.

With the inputs x of a compressed model, the outputs y = W x_0 of the original's layer without its bias, and the moments
C = E[x x^T] and P = E[y x^T], a weight V in the place of W has the error

    E|y - V x|^2 = E|y|^2 - 2 tr(P V^T) + tr(V C V^T),

smallest at V = P C^{-1}, which a structured V approximates. If a bias absorbs the means, covariances replace moments.

A table of embeddings has one output for each token, which counts as often as the token occurs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from einlinear.compression.activations import tokens_of
from einlinear.compression.embedding_tables import token_frequencies
from einlinear.compression.expert_stacks import DenseStack
from einlinear.compression.forward_passes import Passes
from einlinear.compression.selection import Selection, Stage
from einlinear.nn.dense_layers import features, weight_matrix

# bytes of second moments that are collected in one pass over the data
_MEMORY = 2**28
# tokens for each input feature after which a layer's moments change little
_TOKENS_TO_FIT = 64
# columns of a second moment that are computed at a time, of which those above the diagonal are left out
_PANEL = 256


class Calibration:
    """A model on its calibration data; without batches, inputs are unknown, and all directions count alike."""

    def __init__(self, passes: Passes | None, selection: Selection, progress: Callable[[int, int], None]) -> None:
        self._passes, self._progress = passes, progress
        self.layers, self.stages, self.tied_heads = selection.layers, selection.stages, selection.tied_heads
        # a head that is tied to a table has the same weight
        self._read = self.layers | {head: self.layers[table] for table, head in self.tied_heads.items()}

    def statistics(
        self, stages: Sequence[Stage], compressed: Passes | None = None, tokens_per_input: int = _TOKENS_TO_FIT
    ) -> Iterator[tuple[str, Callable[[], InputStatistics]]]:
        """Yield the layers of stages, each with a function that returns its inputs' statistics, and runs the models.

        Batches from all over the data are run until each layer has this many tokens for each of its input features.
        """
        for group in self._groups(stages, compressed is not None):
            first, layer = group[0], self.layers[group[0].names[0]]
            if isinstance(layer, DenseStack):
                # of experts, all layers of a stage have the same inputs
                collected = cache(partial(self._collect_experts, first, tokens_per_input))
                yield from ((name, collected) for name in first.names)
            elif isinstance(layer, nn.Embedding):
                yield from ((name, cache(partial(self._table_statistics, name, first.calls))) for name in first.names)
            else:
                collect = cache(partial(self._collect, group, compressed, tokens_per_input))
                names = ((stage, name) for stage in group for name in stage.names)
                yield from ((name, cache(partial(self._statistics_of, name, stage, collect))) for stage, name in names)

    def _statistics_of(
        self, name: str, stage: Stage, collect: Callable[[], dict[Stage, SecondMomentAccumulator]]
    ) -> InputStatistics:
        layer = self.layers[name]
        if self._passes is None:
            return InputStatistics.white(features(layer)[0], layer.weight.device)
        offset = sum(features(self.layers[other])[1] for other in stage.names[: stage.names.index(name)])
        accumulator = collect()[stage]
        with _prefix_errors(name):
            return accumulator.statistics(weight_matrix(layer), offset, centred=layer.bias is not None)

    def _groups(self, stages: Sequence[Stage], paired: bool) -> list[list[Stage]]:
        groups, room = list[list[Stage]](), 0
        for stage in stages:
            layer = self.layers[stage.names[0]]
            if isinstance(layer, DenseStack | nn.Embedding):
                groups.append([stage])
                room = 0
                continue
            inputs, outputs = features(layer)[0], self._out_features(stage) if paired else 0
            size = 8 * inputs * (inputs + outputs)
            if size > room:
                groups.append([])
                room = _MEMORY
            groups[-1].append(stage)
            room -= size
        return groups

    def _out_features(self, stage: Stage) -> int:
        return sum(features(self.layers[name])[1] for name in stage.names)

    @torch.no_grad()
    def _collect(
        self, stages: Sequence[Stage], compressed: Passes | None, tokens_per_input: int
    ) -> dict[Stage, SecondMomentAccumulator]:
        """Run the data once, and accumulate the inputs of the first layer of each stage."""
        assert self._passes is not None
        accumulators, calls = {}, {stage.names[0]: stage.calls for stage in stages}
        for stage in stages:
            layer, outputs = self._read[stage.names[0]], 0 if compressed is None else self._out_features(stage)
            accumulators[stage] = SecondMomentAccumulator(features(layer)[0], layer.weight.device, outputs)
        numbers = spread_numbers(len(self._passes.batches))
        originals = self._passes.inputs(calls, numbers)
        replaced = None if compressed is None else compressed.inputs(calls, numbers)
        for done, number in enumerate(numbers):
            if all(accumulator.has(tokens_per_input) for accumulator in accumulators.values()):
                break
            self._progress(done, len(numbers))
            batch, original = self._passes.batches[number], next(originals)
            inputs = original if replaced is None else next(replaced)
            for stage, accumulator in accumulators.items():
                name = stage.names[0]
                if name not in original:
                    continue
                with _prefix_errors(f"{name}, batch {number} of the calibration data"):
                    calls_of = inputs.get(name, [])
                    if [x.shape for x in calls_of] != [x.shape for x in original[name]]:
                        # the compressed model sends other tokens to an expert: its outputs are fitted to the original's
                        calls_of = original[name]
                    for x, x_0 in zip(calls_of, original[name], strict=True):
                        tokens = tokens_of(batch, x)
                        if accumulator.has(tokens_per_input):
                            check_finite(tokens)
                            continue
                        y = None if compressed is None else self._outputs(stage, tokens_of(batch, x_0))
                        accumulator.add(tokens, y)
        return accumulators

    @torch.no_grad()
    def _collect_experts(self, stage: Stage, tokens_per_input: int) -> InputStatistics:
        """Return the second moments of the inputs of every expert, each times its share of the tokens.

        Experts with fewer tokens than input features have the second moment of all tokens.
        """
        first, stack = stage.names[0], self.layers[stage.names[0]]
        size, device = stack.in_features, stack.weight.device
        if self._passes is None:
            return InputStatistics.white(size, device)
        experts = [SecondMomentAccumulator(size, device) for _ in range(stack.experts)]
        calls = {f"{first}.inputs.{e}": stage.calls for e in range(stack.experts)}
        numbers = spread_numbers(len(self._passes.batches))
        for done, inputs in enumerate(self._passes.inputs(calls, numbers)):
            self._progress(done, len(numbers))
            with _prefix_errors(f"{first}, batch {numbers[done]} of the calibration data"):
                for name, accumulator in zip(calls, experts, strict=True):
                    for x in inputs.get(name, ()):
                        accumulator.add(x)
            if all(accumulator.has(tokens_per_input) for accumulator in experts):
                break
        tokens = sum(accumulator.tokens for accumulator in experts)
        with _prefix_errors(first):
            if not tokens:
                raise ValueError("it gets no tokens from the calibration data")
            moments = {e: accumulator.second_moment() for e, accumulator in enumerate(experts) if accumulator.tokens}
        of_all = torch.stack([moment * (experts[e].tokens / tokens) for e, moment in moments.items()]).sum(0)
        own = [moments[e] if accumulator.has(1) else of_all for e, accumulator in enumerate(experts)]
        # an expert without tokens has the weight of one
        second_moment = torch.stack([m * (max(a.tokens, 1) / tokens) for m, a in zip(own, experts, strict=True)])
        return InputStatistics(second_moment, second_moment.new_zeros(size), tokens)

    @torch.no_grad()
    def _table_statistics(self, name: str, calls: int) -> InputStatistics:
        """Return the frequencies of the tokens that a table looks up.

        Errors of rows count alike in all directions, and as much again as a head that has the same weight reads them.
        """
        table, device = self.layers[name], self.layers[name].weight.device
        white = InputStatistics.white(table.embedding_dim, device)
        if self._passes is None:
            return white
        counts, moment = self._count_tokens(name, calls, self._passes), white.second_moment
        if (head := self.tied_heads.get(name)) is not None:
            (accumulator,) = self._collect([Stage((head,), 1)], None, _TOKENS_TO_FIT).values()
            read = accumulator.second_moment()
            moment = moment + read / read.diagonal().mean()
        frequencies = token_frequencies(counts).to(device)
        return replace(white, second_moment=moment, tokens=int(counts.sum()), frequencies=frequencies)

    def _count_tokens(self, name: str, calls: int, passes: Passes) -> Tensor:
        """Return how often a table looks up each token."""
        counts = torch.zeros(self.layers[name].num_embeddings, dtype=torch.int64)
        for number, inputs in enumerate(passes.inputs({name: calls})):
            self._progress(number, len(passes.batches))
            for indices in inputs.get(name, ()):
                tokens = tokens_of(passes.batches[number], indices[..., None]).flatten()
                counts += torch.bincount(tokens.cpu(), minlength=len(counts))
        return counts

    def _outputs(self, stage: Stage, x: Tensor) -> Tensor:
        """Return the outputs of all layers of a stage, without biases, in float32."""
        weights = [weight_matrix(self.layers[name]).float() for name in stage.names]
        return torch.cat([x.float() @ weight.T for weight in weights], 1)


def check_finite(x: Tensor) -> None:
    if not x.isfinite().all():
        advice = "leave such a batch out, or give the model a dtype with a wider range"
        raise ValueError(f"its inputs have values that are NaN or infinite: {advice}")


def spread_numbers(count: int) -> list[int]:
    """Return the numbers below a count in an order whose first ones are spread evenly, by the golden ratio."""
    return sorted(range(count), key=lambda number: number * (5**0.5 - 1) / 2 % 1)


class SecondMomentAccumulator:
    """Sums over tokens, in float64, of inputs x, with outputs y of the original, and of their float32 products."""

    def __init__(self, features: int, device: torch.device, outputs: int = 0) -> None:
        self.tokens = 0
        # the first tokens' means, subtracted from all: large means with small variances lose no digits
        self._shifts: list[Tensor] = []
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self._sums = [zeros(features), zeros(outputs)]
        # of x x^T the lower triangle, of y x^T all, and of y y^T the diagonal
        self._product, self._cross, self._squares = zeros(features, features), zeros(outputs, features), zeros(outputs)

    def has(self, tokens_per_input: int) -> bool:
        """Return whether there are this many tokens for each input feature."""
        return self.tokens >= tokens_per_input * len(self._product)

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add inputs, (tokens, features), and the original's outputs of the same tokens, (tokens, outputs)."""
        both = [x] if y is None else [x, y]
        for tensor in both:
            check_finite(tensor)
        if not len(x):
            return
        self._shifts = self._shifts or [tensor.float().mean(0) for tensor in both]
        # in float32 at least
        both = [(tensor - shift).float() for tensor, shift in zip(both, self._shifts, strict=True)]
        for total, tensor in zip(self._sums, both, strict=False):
            total += tensor.sum(0, dtype=torch.float64)
        self.tokens, x = self.tokens + len(x), both[0]
        for start in range(0, len(self._product), _PANEL):
            self._product[start:, start : start + _PANEL] += x[:, start:].T @ x[:, start : start + _PANEL]
        if y is not None:
            self._cross += both[1].T @ x
            self._squares += both[1].square().sum(0, dtype=torch.float64)

    def second_moment(self) -> Tensor:
        """Return E[x x^T] over all tokens so far."""
        return self.statistics(centred=False).second_moment

    def statistics(self, weight: Tensor | None = None, output_offset: int = 0, *, centred: bool) -> InputStatistics:
        """Return the statistics of all tokens so far for a layer; `centred` if a bias absorbs the means.

        With outputs: those of the layer, whose weight is (out_features, in_features), begin at the offset.
        """
        if not self._shifts:
            raise ValueError("its inputs are all padding: no token is left")
        moment = self._product.tril().div_(self.tokens)
        moment += moment.tril(-1).T
        if not moment.isfinite().all():
            raise ValueError("its inputs are too large: their squares overflow float32")
        beyond = self._sums[0] / self.tokens
        mean = self._shifts[0] + beyond
        moment.addr_(beyond, beyond, alpha=-1)
        if not centred:
            moment.addr_(mean, mean)
        # as if both models had a little noise: inputs that are constant become white, and the weight is approximated
        noise = 1e-12 * float((moment.diagonal() + mean.square()).mean())
        original = None
        if len(self._cross):
            assert weight is not None
            rows, w = slice(output_offset, output_offset + len(weight)), weight.detach().double()
            beyond_y = self._sums[1][rows] / self.tokens
            mean_y = self._shifts[1][rows] + beyond_y
            cross = (self._cross[rows] / self.tokens).addr_(beyond_y, beyond, alpha=-1)
            squares = self._squares[rows] / self.tokens - beyond_y.square()
            noise = max(noise, 1e-12 * float((squares + mean_y.square()).sum() / w.square().sum().clamp(min=1e-300)))
            if not centred:
                cross.addr_(mean_y, mean)
                squares += mean_y.square()
            noise = noise or 1.0
            energy = float(squares.sum() + noise * w.square().sum())
            original = OriginalOutputs(cross.add_(w, alpha=noise), mean_y, energy)
        moment.diagonal().add_(noise or 1.0)
        return InputStatistics(moment, mean, self.tokens, original)


@dataclass(frozen=True)
class OriginalOutputs:
    """P, the mean of y, and E|y|^2."""

    cross_moment: Tensor
    mean: Tensor
    energy: float


@dataclass(frozen=True)
class InputStatistics:
    """C and the mean of x, and the original's outputs, if x comes from compressed layers; else y = W x.

    Of a table of embeddings, frequencies say how much each output counts, (out,); of other layers, all count alike.
    """

    second_moment: Tensor
    mean: Tensor
    tokens: int = 0
    original: OriginalOutputs | None = None
    frequencies: Tensor | None = None

    @classmethod
    def white(cls, features: int, device: torch.device) -> InputStatistics:
        """Return the statistics of white inputs, which stand for unknown ones."""
        one = torch.eye(features, dtype=torch.float64, device=device)
        return cls(one, torch.zeros(features, dtype=torch.float64, device=device))

    def damped(self, damping: float) -> Tensor:
        """Return C plus a fraction of its mean variance on the diagonal: few tokens say little of many features."""
        c = self.second_moment.clone()
        # of one matrix, or of each of several
        variances = c.diagonal(dim1=-2, dim2=-1)
        # C is definite in spite of the rounding of float32 products, relative to the sum of all variances
        variances.add_(max(damping, 1e-7 * c.shape[-1]) * variances.mean(-1, keepdim=True))
        return c

    def target_weight(self, weight: Tensor, damping: float) -> Tensor:
        """Return the weight to approximate: P C^{-1}, damped towards W; in directions that never occur it is W."""
        if self.original is None:
            return weight
        w = weight.double()
        change = self.original.cross_moment - w @ self.second_moment
        if damping < 1e-3:
            # variances below 1e-6 of the largest drown in the rounding of float32 products
            correction: Tensor = change @ torch.linalg.pinv(self.damped(damping), rtol=1e-6, hermitian=True)
        else:
            correction = torch.linalg.solve(self.damped(damping), change.T).T
        return (w + correction).to(weight.dtype)

    def output_energy(self, weight: Tensor) -> float:
        """Return E|y|^2."""
        return self._energy(weight.double()) if self.original is None else self.original.energy

    def relative_error(self, weight: Tensor, approximation: Tensor) -> float:
        """Return E|y - V x|^2 / E|y|^2."""
        v, energy = approximation.double(), self.output_energy(weight)
        if self.original is None:
            error = self._energy(weight.double() - v)
        else:
            error = energy - 2 * float((self.original.cross_moment * v).sum()) + self._energy(v)
        return error / energy if energy > 0 else 0.0

    def corrected_bias(self, bias: Tensor, weight: Tensor, approximation: Tensor) -> Tensor:
        """Return the bias with which V's outputs have the mean of W's."""
        mean = weight.double() @ self.mean if self.original is None else self.original.mean
        return (bias.double() + mean - approximation.double() @ self.mean).to(bias.dtype)

    def _energy(self, weight: Tensor) -> float:
        energies = ((weight @ self.second_moment) * weight).sum(-1)
        return float((energies if self.frequencies is None else energies * self.frequencies).sum())


@contextmanager
def _prefix_errors(place: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
