"""Optimizers of single matrices, such as SOAP, for factors, which are batches of matrices."""

from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from einlinear.mup.muon import View, as_matrices, from_matrices
from einlinear.nn.sharded_tensors import full_tensor, sharded_like


class Blockwise(torch.optim.Optimizer):
    """An optimizer of single matrices, such as SOAP, applied to every block of every factor.

    SOAP rotates every axis of a tensor, so it mixes the blocks of a factor, and torch's Muon refuses factors of three
    axes. Here, every matrix of groups with "matrix_view" is a parameter of its own: a copy of the values, and the
    gradient. The optimizer gets the other groups unchanged. It takes one matrix after the other, so that many small
    blocks take long.

    Args:
        groups: those of ``param_groups(..., optimizer="soap")``.
        optimizer: of the blocks: (groups, **options) -> torch optimizer, such as its class.
        **options: of this optimizer.

    Attributes:
        optimizer: of the blocks. Its settings are overwritten by those of the groups at every step.

    Example:
        >>> import torch, einlinear as el
        >>> groups = el.param_groups(el.Linear(64, 64, "btt"), lr=3e-3, base=None, optimizer="soap")
        >>> optimizer = el.mup.Blockwise(groups, torch.optim.AdamW, betas=(0.95, 0.95))
        >>> [len(group["params"]) for group in optimizer.optimizer.param_groups]  # 8 blocks in A, 8 in B; the bias
        [16, 1]
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], optimizer: Callable[..., torch.optim.Optimizer], **options: Any
    ) -> None:
        super().__init__(groups, {})
        self._blocks: list[_Blocks] = []
        inner = []
        for group in self.param_groups:
            params = group["params"]
            if "matrix_view" in group:
                blocks = [_Blocks(p, group["matrix_view"]) for p in params]
                params = [matrix for each in blocks for matrix in each.matrices]
                self._blocks += blocks
            inner.append({**_settings(group), "params": params})
        self.optimizer = optimizer(inner, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group, inner in zip(self.param_groups, self.optimizer.param_groups, strict=True):
            inner.update(_settings(group))
        for blocks in self._blocks:
            blocks.read()
        self.optimizer.step()
        for blocks in self._blocks:
            blocks.write()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "blockwise": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["blockwise"])


class _Blocks:
    """The matrices of one parameter."""

    def __init__(self, p: Tensor, view: View) -> None:
        self.p, self.view = p, view
        self.stack = self._of(p.detach()).clone()
        self.matrices = self.stack.unbind()

    def read(self) -> None:
        self.stack.copy_(self._of(self.p))
        gradients = repeat(None) if self.p.grad is None else self._of(self.p.grad)
        for matrix, gradient in zip(self.matrices, gradients):
            matrix.grad = gradient

    def write(self) -> None:
        if self.p.grad is not None:
            (values,) = from_matrices(self.stack[None], self.view, (1, *self.p.shape))
            self.p.copy_(sharded_like(values, self.p))

    def _of(self, x: Tensor) -> Tensor:
        """Return a parameter or its gradient as (blocks, rows, columns)."""
        return as_matrices(full_tensor(x)[None], self.view)[0]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}
