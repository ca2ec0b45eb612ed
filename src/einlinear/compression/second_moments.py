"""Second moments of a layer's inputs: enough to tell how close another layer's outputs come.

The compressed model's input x may differ from the original's, x_0, because layers before it are compressed. With the
second moments C = E[x x^T], C_0 = E[x_0 x_0^T] and K = E[x_0 x^T], a weight V in the place of W has the error

    E|W x_0 - V x|^2 = tr(W C_0 W^T) - 2 tr(W K V^T) + tr(V C V^T).

A weight without structure would make it smallest at V = W K C^{-1}. So the structured V is the one whose outputs are
closest to those of that matrix. Where a bias absorbs the means, covariances replace the second moments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# rounding of float32, relative to the sum of all variances
_ROUNDING = 1e-7
# from this damping on, C is inverted; below it, its pseudo-inverse is taken
_DAMPED = 1e-3
# of the largest variance: smaller ones drown in the rounding of float32 products
_RESOLVED = 1e-6


class SecondMomentAccumulator:
    """Sums over tokens, in float64, of inputs and of their products, which are float32. All tokens count alike.

    Args:
        features: of the inputs.
        device: of the sums.
        paired: whether the original model's inputs are added as well. Then x and x_0 are one vector of 2 features.
    """

    def __init__(self, features: int, device: torch.device, paired: bool = False) -> None:
        self.tokens, self._features, self._paired = 0, features, paired
        size = 2 * features if paired else features
        # the first tokens' mean, subtracted from all: large means with small variances lose no digits
        self._shift: Tensor | None = None
        self._sum = torch.zeros(size, dtype=torch.float64, device=device)
        self._product = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Count tokens: both (tokens, features), in the same order.

        Raises:
            ValueError: values that are NaN or infinite.
        """
        if original is not None:
            x = torch.cat([x, original], 1)
        if not x.isfinite().all():
            raise ValueError(
                "its inputs have values that are NaN or infinite: leave such a batch out, or give the model a dtype "
                "with a wider range"
            )
        if not len(x):
            return
        if self._shift is None:
            self._shift = x.mean(0, dtype=torch.float64)
        shifted = (x.double() - self._shift).float()
        self.tokens += len(x)
        self._sum += shifted.sum(0, dtype=torch.float64)
        self._product += shifted.T @ shifted

    def statistics(self, centred: bool) -> InputStatistics:
        """Return the statistics of all tokens so far.

        Args:
            centred: whether a bias absorbs the means.

        Raises:
            ValueError: no tokens, or inputs whose squares overflow float32.
        """
        if self._shift is None:
            raise ValueError("its inputs are all padding: no token is left")
        if not self._product.isfinite().all():
            raise ValueError("its inputs are too large: their squares overflow float32")
        beyond = self._sum / self.tokens
        mean = self._shift + beyond
        moment = self._product / self.tokens - torch.outer(beyond, beyond)
        if not centred:
            moment += torch.outer(mean, mean)
        # as if a little noise, the same for both models, were added to all inputs: inputs that are constant, or always
        # zero, then are white, and the weight is approximated
        n = self._features
        energies = (moment.diagonal() + mean.square()).view(-1, n).mean(1)
        noise = 1e-12 * float(energies.max()) or 1.0
        for block in (moment[i : i + n, j : j + n] for i in range(0, len(moment), n) for j in range(0, len(moment), n)):
            block.diagonal().add_(noise)
        if not self._paired:
            return InputStatistics(moment, moment, moment, mean, mean, self.tokens)
        return InputStatistics(moment[:n, :n], moment[n:, n:], moment[n:, :n], mean[:n], mean[n:], self.tokens)


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of a layer's inputs, in float64, each (features, features), and means, (features,).

    Attributes:
        second_moment, original_second_moment, cross_moment: C, C_0 and K; all the same tensor without compressed layers
            in front.
        mean, original_mean: of x and of x_0.
        tokens: how many were counted; 0 without data, when weights are compared instead of outputs.
    """

    second_moment: Tensor
    original_second_moment: Tensor
    cross_moment: Tensor
    mean: Tensor
    original_mean: Tensor
    tokens: int = 0

    @classmethod
    def white(cls, features: int, device: torch.device) -> InputStatistics:
        """Return the statistics of white inputs, which stand for unknown ones: all directions count alike."""
        one = torch.eye(features, dtype=torch.float64, device=device)
        zero = torch.zeros(features, dtype=torch.float64, device=device)
        return cls(one, one, one, zero, zero)

    def damped(self, damping: float) -> Tensor:
        """Return C plus a fraction of its mean variance on the diagonal: few tokens say little of many features.

        The fraction is at least what makes C definite in spite of the rounding of float32 products.
        """
        c = self.second_moment
        fraction = max(damping, _ROUNDING * len(c))
        return c + fraction * c.diagonal().mean() * torch.eye(len(c)).to(c)

    def target_weight(self, weight: Tensor, damping: float) -> Tensor:
        """Return the weight to approximate: W K C^{-1}, damped towards W; in directions that never occur it is W."""
        if self.cross_moment is self.second_moment:
            return weight
        w = weight.double()
        change = w @ (self.cross_moment - self.second_moment)
        if damping < _DAMPED:
            inverse: Tensor = torch.linalg.pinv(self.damped(damping), rtol=_RESOLVED, hermitian=True)
            return (w + change @ inverse).to(weight.dtype)
        solution: Tensor = torch.linalg.solve(self.damped(damping), change.T)
        return (w + solution.T).to(weight.dtype)

    def output_energy(self, weight: Tensor) -> float:
        """Return E|W x_0|^2."""
        w = weight.double()
        return float(((w @ self.original_second_moment) * w).sum())

    def relative_error(self, weight: Tensor, approximation: Tensor) -> float:
        """Return E|W x_0 - V x|^2 / E|W x_0|^2."""
        w, v = weight.double(), approximation.double()
        energy = self.output_energy(w)
        error = energy - 2 * float(((w @ self.cross_moment) * v).sum()) + float(((v @ self.second_moment) * v).sum())
        return error / energy if energy > 0 else 0.0

    def corrected_bias(self, bias: Tensor, weight: Tensor, approximation: Tensor) -> Tensor:
        """Return the bias with which V's outputs have the mean of W's."""
        shift = weight.double() @ self.original_mean - approximation.double() @ self.mean
        return (bias.double() + shift).to(bias.dtype)
