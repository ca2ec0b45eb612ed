"""Functions whose result torch.compile treats as a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def assume_constant_result(function: F) -> F:
    """`torch.compiler.assume_constant_result` without its import of the compiler, which takes longer than torch's own.

    The decorator of torch does the same: it sets the mark that the compiler looks for.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
