"""Calibration: second moments of the inputs of a model's layers tell how close another layer's outputs come.

With the inputs x of a compressed model, x_0 of the original, and the second moments C = E[x x^T], C_0 = E[x_0 x_0^T]
and K = E[x_0 x^T], a weight V in the place of W has the error

    E|W x_0 - V x|^2 = tr(W C_0 W^T) - 2 tr(W K V^T) + tr(V C V^T).

smallest at V = W K C^{-1}, which a structured V approximates. If a bias absorbs the means, covariances replace moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from einlinear.compression.activations import tokens_of
from einlinear.compression.forward_passes import Passes
from einlinear.compression.selection import Selection, Stage
from einlinear.nn.dense_layers import features

# bytes of second moments that are collected in one pass over the data
_MEMORY = 2**31


class Calibration:
    """A model on its calibration data; without batches, inputs are unknown, and all directions count alike."""

    def __init__(self, passes: Passes | None, selection: Selection, progress: Callable[[int, int], None]) -> None:
        self._passes, self._progress = passes, progress
        self.layers, self.stages = selection.layers, selection.stages

    def statistics(
        self, stages: Sequence[Stage], compressed: Passes | None = None
    ) -> Iterator[tuple[str, Callable[[], InputStatistics]]]:
        """Yield the layers of stages, each with a function that returns its inputs' statistics, and runs the models."""
        for group in self._groups(stages, copies=1 if compressed is None else 4):
            collect = cache(partial(self._collect, group, compressed))
            for stage in group:
                for name in stage.names:
                    yield name, cache(partial(self._statistics_of, name, stage, collect))

    def _statistics_of(
        self, name: str, stage: Stage, collect: Callable[[], dict[Stage, SecondMomentAccumulator]]
    ) -> InputStatistics:
        layer = self.layers[name]
        if self._passes is None:
            return InputStatistics.white(features(layer)[0], layer.weight.device)
        accumulator = collect()[stage]
        with _naming(name):
            return accumulator.statistics(centred=layer.bias is not None)

    def _groups(self, stages: Sequence[Stage], copies: int) -> list[list[Stage]]:
        groups, size = list[list[Stage]](), _MEMORY
        for stage in stages:
            added = 8 * copies * features(self.layers[stage.names[0]])[0] ** 2
            size += added
            if size > _MEMORY:
                groups.append([])
                size = added
            groups[-1].append(stage)
        return groups

    def _collect(self, stages: Sequence[Stage], compressed: Passes | None) -> dict[Stage, SecondMomentAccumulator]:
        """Run the data once, and accumulate the inputs of the first layer of each stage."""
        assert self._passes is not None
        accumulators, calls = {}, {stage.names[0]: stage.calls for stage in stages}
        for stage in stages:
            layer = self.layers[stage.names[0]]
            accumulators[stage] = SecondMomentAccumulator(features(layer)[0], layer.weight.device, bool(compressed))
        originals, batches = self._passes.inputs(calls), self._passes.batches
        replaced = None if compressed is None else compressed.inputs(calls)
        for number, batch in enumerate(batches):
            self._progress(number, len(batches))
            original = next(originals)
            inputs = original if replaced is None else next(replaced)
            for stage, accumulator in accumulators.items():
                name = stage.names[0]
                if name not in original:
                    continue
                with _naming(f"{name}, batch {number} of the calibration data"):
                    if [x.shape for x in inputs.get(name, ())] != [x.shape for x in original[name]]:
                        cause = "the compressed model sends other tokens to this layer, such as an expert"
                        raise ValueError(f"{cause}, than the original. Give sequential=False")
                    for x, x_0 in zip(inputs[name], original[name], strict=True):
                        accumulator.add(tokens_of(batch, x), None if compressed is None else tokens_of(batch, x_0))
        return accumulators


class SecondMomentAccumulator:
    """Sums over tokens, in float64, of inputs and of their float32 products; if `paired`, x and x_0 are one vector."""

    def __init__(self, features: int, device: torch.device, paired: bool = False) -> None:
        self.tokens, self._features, self._paired = 0, features, paired
        size = 2 * features if paired else features
        # the first tokens' mean, subtracted from all: large means with small variances lose no digits
        self._shift: Tensor | None = None
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        self._product = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Add tokens, (tokens, features), and those of the original in the same order."""
        if original is not None:
            x = torch.cat([x, original], 1)
        if not x.isfinite().all():
            advice = "leave such a batch out, or give the model a dtype with a wider range"
            raise ValueError(f"its inputs have values that are NaN or infinite: {advice}")
        if not len(x):
            return
        if self._shift is None:
            self._shift = x.mean(0, dtype=torch.float64)
        shifted = (x.double() - self._shift).float()
        self.tokens += len(x)
        self._sum += shifted.sum(0, dtype=torch.float64)
        self._product += shifted.T @ shifted

    def statistics(self, centred: bool) -> InputStatistics:
        """Return the statistics of all tokens so far; `centred` if a bias absorbs the means."""
        if self._shift is None:
            raise ValueError("its inputs are all padding: no token is left")
        if not self._product.isfinite().all():
            raise ValueError("its inputs are too large: their squares overflow float32")
        beyond = self._sum / self.tokens
        mean = self._shift + beyond
        moment = self._product / self.tokens - torch.outer(beyond, beyond)
        if not centred:
            moment += torch.outer(mean, mean)
        # as if both models had a little noise: inputs that are constant become white, and the weight is approximated
        n = self._features
        energies = (moment.diagonal() + mean.square()).view(-1, n).mean(1)
        noise = 1e-12 * float(energies.max()) or 1.0
        for offset in range(-len(moment) + n, len(moment), n):
            moment.diagonal(offset).add_(noise)
        if not self._paired:
            return InputStatistics(moment, moment, moment, mean, mean, self.tokens)
        return InputStatistics(moment[:n, :n], moment[n:, n:], moment[n:, :n], mean[:n], mean[n:], self.tokens)


@dataclass(frozen=True)
class InputStatistics:
    """C, C_0 and K, which are the same tensor without compressed layers in front, and the means of x and x_0."""

    second_moment: Tensor
    original_second_moment: Tensor
    cross_moment: Tensor
    mean: Tensor
    original_mean: Tensor
    tokens: int = 0

    @classmethod
    def white(cls, features: int, device: torch.device) -> InputStatistics:
        """Return the statistics of white inputs, which stand for unknown ones."""
        one = torch.eye(features, dtype=torch.float64, device=device)
        zero = torch.zeros(features, dtype=torch.float64, device=device)
        return cls(one, one, one, zero, zero)

    def damped(self, damping: float) -> Tensor:
        """Return C plus a fraction of its mean variance on the diagonal: few tokens say little of many features."""
        c = self.second_moment
        # C is definite in spite of the rounding of float32 products, relative to the sum of all variances
        fraction = max(damping, 1e-7 * len(c))
        return c + fraction * c.diagonal().mean() * torch.eye(len(c)).to(c)

    def target_weight(self, weight: Tensor, damping: float) -> Tensor:
        """Return the weight to approximate: W K C^{-1}, damped towards W; in directions that never occur it is W."""
        if self.cross_moment is self.second_moment:
            return weight
        w = weight.double()
        change = w @ (self.cross_moment - self.second_moment)
        if damping < 1e-3:
            # variances below 1e-6 of the largest drown in the rounding of float32 products
            correction: Tensor = change @ torch.linalg.pinv(self.damped(damping), rtol=1e-6, hermitian=True)
        else:
            correction = torch.linalg.solve(self.damped(damping), change.T).T
        return (w + correction).to(weight.dtype)

    def output_energy(self, weight: Tensor) -> float:
        """Return E|W x_0|^2."""
        return _inner(weight.double(), self.original_second_moment, weight.double())

    def relative_error(self, weight: Tensor, approximation: Tensor) -> float:
        """Return E|W x_0 - V x|^2 / E|W x_0|^2."""
        w, v = weight.double(), approximation.double()
        energy = self.output_energy(w)
        error = energy - 2 * _inner(w, self.cross_moment, v) + _inner(v, self.second_moment, v)
        return error / energy if energy > 0 else 0.0

    def corrected_bias(self, bias: Tensor, weight: Tensor, approximation: Tensor) -> Tensor:
        """Return the bias with which V's outputs have the mean of W's."""
        shift = weight.double() @ self.original_mean - approximation.double() @ self.mean
        return (bias.double() + shift).to(bias.dtype)


def _inner(w: Tensor, moment: Tensor, v: Tensor) -> float:
    return float(((w @ moment) * v).sum())


@contextmanager
def _naming(place: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
