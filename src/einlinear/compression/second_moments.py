"""What is known of a layer's inputs, streamed over tokens: enough to say how close another layer's outputs come.

The compressed model's input x may differ from the original's, x_0, because layers before it are compressed. With their
second moments C = E[x x^T], C_0 = E[x_0 x_0^T] and K = E[x_0 x^T], a weight V in the place of W has the error

    E|W x_0 - V x|^2 = tr(W C_0 W^T) - 2 tr(W K V^T) + tr(V C V^T),

which V = W K C^{-1} would make smallest, were it free. So the structured V is the one whose outputs are closest to
those of that matrix. Where there is a bias it takes the means, and what counts are covariances.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 1e-7  # of float32, of all variances together
_DAMPED = 1e-3  # from this damping on, C can be inverted
_RESOLVED = 1e-6  # of the largest variance: smaller ones drown in the rounding of float32 products


class Moments:
    """Sums over tokens, in float64; products are in float32. All tokens of all batches count alike.

    Args:
        features: of the inputs.
        device: that the sums are kept on.
        paired: whether the original model's inputs are given as well.
    """

    def __init__(self, features: int, device: torch.device, paired: bool = False) -> None:
        self.tokens = 0
        parts = ("x", "original") if paired else ("x",)
        # the sums are of what is left of the first tokens' means: of large means with small variances nothing is lost
        self._shifts: dict[str, Tensor] = {}
        self._sums = {name: torch.zeros(features, dtype=torch.float64, device=device) for name in parts}
        pairs = [(a, b) for i, a in enumerate(parts) for b in parts[: i + 1]]
        self._products = {pair: torch.zeros(features, features, dtype=torch.float64, device=device) for pair in pairs}

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Count tokens: both (tokens, features), in the same order.

        Raises:
            ValueError: values that are NaN or infinite.
        """
        given = {"x": x} | ({} if original is None else {"original": original})
        if not all(bool(tensor.isfinite().all()) for tensor in given.values()):
            raise ValueError(
                "its inputs have values that are NaN or infinite: leave such a batch out, or give the model a dtype "
                "with a wider range"
            )
        if not len(x):
            return
        self.tokens += len(x)
        left = {}
        for name, tensor in given.items():
            shift = self._shifts.setdefault(name, tensor.mean(0, dtype=torch.float64))
            left[name] = (tensor.double() - shift).float()
            self._sums[name] += left[name].sum(0, dtype=torch.float64)
        for (a, b), product in self._products.items():
            product += left[a].T @ left[b]

    def inputs(self, centred: bool) -> Inputs:
        """What was seen so far.

        Args:
            centred: whether a bias takes the means.

        Raises:
            ValueError: inputs whose squares overflow float32.
        """
        if not all(bool(product.isfinite().all()) for product in self._products.values()):
            raise ValueError("its inputs are too large: their squares overflow float32")
        beyond = {name: total / self.tokens for name, total in self._sums.items()}
        means = {name: shift + beyond[name] for name, shift in self._shifts.items()}
        second = {
            (a, b): product / self.tokens
            - torch.outer(beyond[a], beyond[b])
            + (0 if centred else torch.outer(means[a], means[b]))
            for (a, b), product in self._products.items()
        }
        # as if a little noise, the same for both models, were added to all inputs: inputs that are constant, or always
        # zero, then are white, so that it is the weight that is approximated
        squares = [second[name, name].diagonal().mean() + mean.square().mean() for name, mean in means.items()]
        noise = 1e-12 * float(max(squares)) or 1.0
        second = {pair: moment + noise * torch.eye(len(moment)).to(moment) for pair, moment in second.items()}
        own, mean = second["x", "x"], means["x"]
        return Inputs(
            own,
            second.get(("original", "original"), own),
            second.get(("original", "x"), own),
            mean,
            means.get("original", mean),
            self.tokens,
            is_paired=("original", "x") in second,
        )


@dataclass(frozen=True)
class Inputs:
    """Moments of a layer's inputs, in float64, each (features, features), and means, (features,).

    Attributes:
        own, original, cross: C, C_0 and K.
        mean, original_mean: of x and of x_0.
        tokens: how many were seen.
        is_paired: whether the original's inputs are others.
        is_white: whether nothing is known, so that it is weights that are compared.
    """

    own: Tensor
    original: Tensor
    cross: Tensor
    mean: Tensor
    original_mean: Tensor
    tokens: int = 0
    is_paired: bool = False
    is_white: bool = False

    @classmethod
    def white(cls, features: int, device: torch.device) -> Inputs:
        """Of inputs of which nothing is known: all directions alike."""
        one = torch.eye(features, dtype=torch.float64, device=device)
        zero = torch.zeros(features, dtype=torch.float64, device=device)
        return cls(one, one, one, zero, zero, is_white=True)

    def damped(self, damping: float) -> Tensor:
        """C, and a fraction of its mean variance on the diagonal: what few tokens say of many features is noise.

        It is never less than what makes C definite, which float32 products leave off by their rounding.
        """
        fraction = max(damping, _ROUNDING * len(self.own))
        return self.own + fraction * self.own.diagonal().mean() * torch.eye(len(self.own)).to(self.own)

    def target(self, weight: Tensor, damping: float) -> Tensor:
        """The weight to approximate: W K C^{-1}, damped towards W; in directions that never occur it is W."""
        if not self.is_paired:
            return weight
        w = weight.double()
        change = w @ (self.cross - self.own)
        if damping < _DAMPED:
            inverse: Tensor = torch.linalg.pinv(self.damped(damping), rtol=_RESOLVED, hermitian=True)
            return (w + change @ inverse).to(weight.dtype)
        moved: Tensor = torch.linalg.solve(self.damped(damping), change.T)
        return (w + moved.T).to(weight.dtype)

    def energy(self, weight: Tensor) -> float:
        """E|W x_0|^2."""
        w = weight.double()
        return float(((w @ self.original) * w).sum())

    def error(self, weight: Tensor, other: Tensor) -> float:
        """E|W x_0 - V x|^2 over E|W x_0|^2."""
        w, v = weight.double(), other.double()
        energy = self.energy(w)
        difference = energy - 2 * float(((w @ self.cross) * v).sum()) + float(((v @ self.own) * v).sum())
        return difference / energy if energy > 0 else 0.0

    def bias(self, bias: Tensor, weight: Tensor, other: Tensor) -> Tensor:
        """The bias that gives V's outputs the mean of W's."""
        shift = weight.double() @ self.original_mean - other.double() @ self.mean
        return (bias.double() + shift).to(bias.dtype)
