"""`Embedding`: the drop-in for `torch.nn.Embedding` whose table is a structured matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from einlinear import ops
from einlinear.nn.layer_descriptions import STRUCTURED, LayerInfo, ParameterRole
from einlinear.nn.linear import FactoredMatrix
from einlinear.ops.context import is_exported
from einlinear.structures import Structure
from einlinear.structures.initialization import table_std


class Embedding(FactoredMatrix):
    """Table of embeddings, the rows of a structured W of shape (num_embeddings, embedding_dim), which is never built.

    Inputs are indices, integers of any shape; outputs have one more dimension, of size embedding_dim. Parameters are
    the factors, as in `einlinear.Linear(embedding_dim, num_embeddings, structure)`, an output head whose weight is the
    same matrix: to tie the two, assign the factors of one to the other.

    Args:
        num_embeddings, embedding_dim: as for `torch.nn.Embedding`.
        padding_idx: of a row that passes no gradient on. It is not zero, and changes with the factors of other rows.
        structure: of W: a spec such as ``"low_rank(rank=64)"``, a pattern, or a `Structure` of this size.
        device, dtype: of the parameters.

    New tables have entries of root mean square 1, like those of torch.

    Raises:
        ValueError: a structure that is unknown or does not fit, a `padding_idx` that is no index.
        TypeError: on call, inputs that are not integers.
        IndexError: on call on a CPU, an index below 0 or from num_embeddings on.

    Example:
        >>> import torch, einlinear as el
        >>> table = el.Embedding(32_000, 512, "low_rank(rank=64)")
        >>> table(torch.tensor([[1, 5, 31_999]])).shape
        torch.Size([1, 3, 512])
        >>> head = el.Linear(512, 32_000, "low_rank(rank=64)", bias=False)
        >>> head.A, head.B = table.A, table.B
    """

    # the class of the layer that it replaced: `einlinear.densify` restores it
    dense_class: type[nn.Module] = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        structure: str | Structure,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embedding_dim, num_embeddings, structure, bias=False, device=device, dtype=dtype)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx must be the index of one of {num_embeddings} rows, not {padding_idx}")
        self.num_embeddings, self.embedding_dim = self.out_features, self.in_features
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings

    @classmethod
    @torch.no_grad()
    def like(cls, dense: Any, structure: str | Structure, **config: Any) -> Any:
        """Return a new embedding like a dense one, with entries as large, on average, unless these are all zero."""
        config |= {"device": dense.weight.device, "dtype": dense.weight.dtype}
        layer = cls(dense.num_embeddings, dense.embedding_dim, structure, dense.padding_idx, **config)
        size = 1.0 if dense.weight.is_meta else float(dense.weight.float().square().mean().sqrt())
        for _, factors in layer.structure.by_term([factor.name for factor in layer.structure.factors]):
            for factor in factors:
                layer.get_parameter(factor).mul_((size or 1.0) ** (1 / len(factors)))
        return layer.with_flags_of(dense)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, table: nn.Embedding | Tensor, structure: str | Structure) -> Embedding:
        """Return the structured table closest to a dense one, or to its weight, in Frobenius norm.

        Raises:
            TypeError, ValueError: neither of these, or on the meta device; a structure that does not fit.

        Example:
            >>> import torch, einlinear as el
            >>> el.Embedding.from_dense(torch.nn.Embedding(64, 32), "low_rank(rank=4)").structure.params
            384
        """
        weight = table if isinstance(table, Tensor) else getattr(table, "weight", None)
        if not isinstance(weight, Tensor):
            raise TypeError(f"expected a torch.nn.Embedding or its weight, not a {type(table).__name__}")
        if weight.dim() != 2:
            raise ValueError(f"a table has shape (num_embeddings, embedding_dim), not {tuple(weight.shape)}")
        if weight.is_meta:
            raise ValueError("a table on the meta device has no values to project: load it first")
        padding = getattr(table, "padding_idx", None)
        rows, columns = weight.shape
        layer = cls(rows, columns, structure, padding, device=weight.device, dtype=weight.dtype)
        for factor, value in zip(layer.structure.factors, ops.project(layer.structure, weight), strict=True):
            layer.get_parameter(factor.name).copy_(value).requires_grad_(weight.requires_grad)
        return layer if isinstance(table, Tensor) else layer.train(table.training)

    def init_stds(self) -> tuple[float, ...]:
        return table_std(self.structure)

    def forward(self, indices: Tensor) -> Tensor:
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise TypeError(f"an embedding takes integers, not {indices.dtype}")
        flat = indices.flatten().long()
        # reading the values of a GPU would wait for it
        is_traced = torch.compiler.is_compiling() or is_exported()
        if flat.device.type == "cpu" and flat.numel() and not is_traced:
            low, high = map(int, torch.aminmax(flat))
            if low < 0 or high >= self.num_embeddings:
                wrong = low if low < 0 else high
                raise IndexError(
                    f"index {wrong} is out of range: the embedding has rows 0 to {self.num_embeddings - 1}"
                )
        rows = self.lookup(flat)
        if self.padding_idx is not None:
            rows = torch.where((flat == self.padding_idx)[:, None], rows.detach(), rows)
        return rows.reshape(*indices.shape, rows.shape[-1])

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the rows of indices (n,) that are known to be in range, (n, embedding_dim)."""
        return ops.rows(self.structure, self.factors(), indices)

    @torch.no_grad()
    def to_dense(self) -> nn.Embedding:
        """Return a `torch.nn.Embedding` with the same rows, device, dtype, training mode and requires_grad."""
        weight = self.dense_weight()
        size = self.num_embeddings, self.embedding_dim
        table = nn.Embedding(*size, self.padding_idx, device=weight.device, dtype=weight.dtype)
        table.weight.copy_(weight).requires_grad_(any(p.requires_grad for p in self.weight_parameters()))
        return table.train(self.training)

    def layer_info(self) -> LayerInfo:
        s, size = self.structure, (self.in_features, self.out_features)
        roles = {f.name: ParameterRole("input", *size, s, i) for i, f in enumerate(s.factors)}
        return LayerInfo(roles, category=STRUCTURED)

    def extra_repr(self) -> str:
        s, padding = self.structure, "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, structure={s.spec!r}{padding}, params={s.params}"
