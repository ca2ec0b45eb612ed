"""Scaling curves as mathematics: power-law fits, and how much more compute dense needs for the same loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import linregress

Point = tuple[float, float]  # (MACs, loss), both positive
Bound = Literal["", ">", "<"]


@dataclass(frozen=True)
class PowerLaw:
    """loss = scale * macs ** -exponent.

    Attributes:
        exponent, scale: of the law.
        stderr: standard error of the exponent; NaN with two points, which any line fits.
        r_squared: share of the variance of log loss that the law explains.
    """

    exponent: float
    scale: float
    stderr: float
    r_squared: float

    def __call__(self, macs: float) -> float:
        return float(self.scale * macs**-self.exponent)


@dataclass(frozen=True)
class Multiplier:
    """How many times the MACs dense needs for the same loss; with a bound where its curve ends before it says.

    Attributes:
        value: the multiplier, or what it is above (">") or below ("<").
        bound: "" where value is the multiplier itself.
    """

    value: float
    bound: Bound = ""

    def __str__(self) -> str:
        return f"{self.text}×"

    @property
    def text(self) -> str:
        """Without the multiplication sign."""
        return f"{self.bound} {self.value:.2f}".lstrip()


@dataclass(frozen=True)
class Spread:
    """Multipliers of several seeds.

    Attributes:
        mean: their geometric mean, itself a bound where some of them are; None where upper and lower bounds mix.
        smallest, largest: of them.
        seeds: how many there are.
    """

    mean: Multiplier | None
    smallest: Multiplier
    largest: Multiplier
    seeds: int

    def __str__(self) -> str:
        mean = str(self.mean) if self.mean else "unclear"
        ends = f" ({self.smallest.text} to {self.largest.text})"
        return mean if self.smallest == self.largest else mean + ends


def fit_power_law(points: Sequence[Point]) -> PowerLaw | None:
    """The least-squares line through log loss over log MACs; None where all points have the same MACs, or none exist.

    >>> law = fit_power_law([(100, 0.4), (400, 0.2)])
    >>> round(law.exponent, 6), round(law(1600), 6)
    (0.5, 0.1)
    """
    macs = [math.log(macs) for macs, _ in points]
    if len(set(macs)) < 2:
        return None
    line = linregress(macs, [math.log(loss) for _, loss in points])
    stderr = float(line.stderr) if len(points) > 2 else math.nan
    return PowerLaw(-float(line.slope), math.exp(line.intercept), stderr, float(line.rvalue) ** 2)


def compute_multiplier(dense: Iterable[Point], macs: float, loss: float) -> Multiplier:
    """How many times `macs` dense needs to reach `loss`.

    The dense curve is followed from its cheapest point to where it first reaches the loss, on straight lines between
    points in log-log space. A loss outside the curve gives a bound, never an extrapolation.

    >>> dense = [(100, 0.4), (400, 0.2)]
    >>> print(compute_multiplier(dense, 50, 0.2), "|", compute_multiplier(dense, 50, 0.1))
    8.00× | > 8.00×

    Raises:
        ValueError: no dense point.
    """
    curve = sorted(dense)
    if not curve:
        raise ValueError("the compute multiplier needs at least one point of the dense curve")
    if loss > curve[0][1]:
        return Multiplier(curve[0][0] / macs, "<")
    for (macs_0, loss_0), (macs_1, loss_1) in zip([curve[0], *curve], curve, strict=False):
        if loss_1 <= loss:
            share = math.log(loss_0 / loss) / math.log(loss_0 / loss_1) if loss_0 > loss_1 else 0.0
            return Multiplier(macs_0 * (macs_1 / macs_0) ** share / macs)
    return Multiplier(curve[-1][0] / macs, ">")


def spread(multipliers: Sequence[Multiplier]) -> Spread | None:
    """The geometric mean and the range of several seeds' multipliers; None of none.

    >>> print(spread([Multiplier(2.0), Multiplier(8.0, ">")]))
    > 4.00× (2.00 to > 8.00)
    """
    if not multipliers:
        return None
    bounds = {multiplier.bound for multiplier in multipliers} - {""}
    mean = None
    if len(bounds) < 2:  # a mean of values and lower bounds is a lower bound, and likewise for upper ones
        logs = [math.log(multiplier.value) for multiplier in multipliers]
        mean = Multiplier(math.exp(math.fsum(logs) / len(logs)), next(iter(bounds), ""))
    ordered = sorted(multipliers, key=lambda multiplier: multiplier.value)
    return Spread(mean, ordered[0], ordered[-1], len(multipliers))
