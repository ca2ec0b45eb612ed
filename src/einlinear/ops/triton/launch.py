"""Launches of the kernels: memory for the result, candidate tiles, number of programs, arguments.

With a routing, weights are stacked, intermediates have a row for every slot (`slots.py`), and the first and the last
step address the rows of tokens and pairs themselves: there is no separate gather or scatter.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from einlinear.ops.triton import tile_sizes
from einlinear.ops.triton.slots import EVERY_SLOT, Rows, Slots
from einlinear.ops.triton.strided_steps import Layout, StridedStep
from einlinear.ops.triton.tile_sizes import Tile

# options of the compiler; written out since the default is about to change
OPTIONS = {"enable_fp_fusion": True}
# whether to measure which of the candidate tiles is fastest, or to take the first
TUNE = os.environ.get("EINLINEAR_TUNE") != "0"


def interpreting() -> bool:
    """Return whether kernels are interpreted on the CPU. The variable must be set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Operand(NamedTuple):
    """An input, intermediate or gradient, and the rows of the slots in it."""

    tensor: Tensor
    rows: Rows = EVERY_SLOT


@dataclass(frozen=True)
class Launcher:
    """The launches of one product.

    Attributes:
        tokens: the number of tokens, or of slots.
        slots: the pairs of tokens and experts if there is a routing, else None.
    """

    tokens: int
    slots: Slots | None = None

    def forward(
        self,
        step: StridedStep,
        weight: Tensor,
        source: Operand,
        rows: Rows = EVERY_SLOT,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return the result of a step, plus the bias and the residual, which has the layout of the result.

        With slots, the weight is stacked, and `rows` are the rows of the slots in the result.
        """
        from einlinear.ops.triton.kernels import forward_step

        x = source.tensor
        result = self._empty(step.result, rows, x)
        source_address, result_address = _address(x, step.source), _address(result, step.result)
        # without slots, padding of the tokens included
        tokens = self.tokens if self.slots else max(source_address[2], result_address[2])
        sizes = dict(zip("BFN", step.counts), T=tokens)
        _launch(
            forward_step, lambda blocks: _count_blocks(sizes, blocks),
            tile_sizes.forward_tiles(step, x.itemsize, self._tile_tokens, tile_sizes.device_limits(x.device)),
            x, weight, bias, residual, result,
            source.rows.numbers, source.rows.gates, rows.numbers, self.slots and self.slots.experts,
            *source_address, *result_address, step.params, _bucket(self.tokens), **self._constants(step, x.dtype),
        )  # fmt: skip
        return result

    def backward(
        self,
        step: StridedStep,
        weight: Tensor,
        source: Operand,
        grad: Operand,
        joint: bool,
        rows: Rows = EVERY_SLOT,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of the factor and, if joint (which `fits_joint` allows), that of the source.

        `grad` is the gradient of the result. The residual is added to the gradient of the source, in which the slots
        have these rows.
        """
        from einlinear.ops.triton.kernels import backward_step

        x = source.tensor
        grad_source = self._empty(step.source, rows, x) if joint else None
        addresses = [
            _address(grad.tensor, step.result),
            _address(x, step.source),
            (0, 0, 0) if grad_source is None else _address(grad_source, step.source),
        ]
        tiles = self._backward_tiles(step, weight, joint)
        if self.slots is None:
            limits = tile_sizes.device_limits(x.device)
            share = tile_sizes.share(step, x.itemsize, _bucket(self.tokens), limits, joint)
            tokens = max(address[2] for address in addresses)
            splits = max(_count_shares(tokens, step.counts[1], share, dict(tile.blocks)) for tile in tiles)
            dtype = torch.float32 if splits > 1 else weight.dtype
            grad_factors = weight.new_empty((splits, *weight.shape), dtype=dtype)
        else:
            # the slots of each expert are summed by one program
            share, splits, grad_factors = 0, len(weight), torch.empty_like(weight)
        batch, _, new, contracted = step.counts
        sizes = {"B": batch, "N": new, "K": contracted}
        _launch(
            backward_step, lambda blocks: splits * _count_blocks(sizes, blocks), tiles,
            grad.tensor, weight, x, residual, grad_source, grad_factors,
            grad.rows.numbers, source.rows.numbers, source.rows.gates, rows.numbers,
            self.slots and self.slots.starts,
            *addresses[0], *addresses[1], *addresses[2], step.params, _bucket(self.tokens),
            **self._constants(step, x.dtype), SHARE=share,
        )  # fmt: skip
        if self.slots is not None:
            return grad_factors, grad_source
        return grad_factors.sum(0).to(weight.dtype) if splits > 1 else grad_factors[0], grad_source

    def fits_joint(self, step: StridedStep, weight: Tensor) -> bool:
        """Return whether a tile can hold a whole matrix of the factor, as the joint backward step needs it."""
        return bool(self._backward_tiles(step, weight, joint=True))

    def _backward_tiles(self, step: StridedStep, weight: Tensor, joint: bool) -> tuple[Tile, ...]:
        limits = tile_sizes.device_limits(weight.device)
        return tile_sizes.backward_tiles(step, weight.itemsize, self._tile_tokens, limits, joint)

    @property
    def _tile_tokens(self) -> int:
        """The largest number of tokens of a tile that is of use."""
        return self.slots.block_size if self.slots else _bucket(self.tokens)

    def _empty(self, layout: Layout, rows: Rows, like: Tensor) -> Tensor:
        """Memory for a tensor. Tokens that come last are padded to whole sectors; kernels write zeros there."""
        n = rows.total or self.tokens
        return like.new_empty((layout.features, math.ceil(n / 16) * 16) if layout.tokens_last else (n, layout.features))

    def _constants(self, step: StridedStep, dtype: torch.dtype) -> dict[str, Any]:
        return {
            **step.groups,
            **dict(zip("BFNK", step.counts, strict=True)),
            "SOURCE_LIMIT": step.source.limit,
            "RESULT_LIMIT": step.result.limit,
            "PRECISION": _precision(dtype),
            "BLOCK_SLOTS": self.slots.block_size if self.slots else 0,
        }


def _launch(
    kernel: Any, programs: Callable[[Mapping[str, int]], int], tiles: Sequence[Tile], *args: Any, **constants: Any
) -> None:
    """Run a kernel with the fastest of these tiles, or with the first if none is measured."""
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device_of(tensor):

        def grid(blocks: Mapping[str, int]) -> tuple[int]:
            return (programs(blocks),)

        if TUNE and not interpreting():
            _autotuned(kernel, tuple(tiles), tuple(constants))[grid](*args, **constants, **OPTIONS)
        else:
            options = {"num_warps": tiles[0].warps, "num_stages": tiles[0].stages, **OPTIONS}
            kernel[grid](*args, **constants, **dict(tiles[0].blocks), **options)


@lru_cache(maxsize=4096)
def _autotuned(kernel: Any, tiles: tuple[Tile, ...], constants: tuple[str, ...]) -> Any:
    """The kernel, tuned at its first use for each structure, dtype and power of two of tokens, and cached on disk."""
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]

    configs = [triton.Config(dict(tile.blocks), num_warps=tile.warps, num_stages=tile.stages) for tile in tiles]
    return triton.autotune(configs, key=["bucket", *constants], cache_results=True)(kernel)


def _precision(dtype: torch.dtype) -> str:
    """The precision of products: torch's own setting for float32."""
    if interpreting():
        return "widen"
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed and dtype == torch.float32 else "ieee"


def _address(tensor: Tensor, layout: Layout) -> tuple[int, int, int]:
    """The strides of tokens and of features, and the number of tokens, padding included."""
    if layout.tokens_last:
        return 1, tensor.stride(0), tensor.shape[1]
    return tensor.stride(0), 1, tensor.shape[0]


def _bucket(tokens: int) -> int:
    """The number of tokens, as far as tuning distinguishes it."""
    return max(16, 1 << (tokens - 1).bit_length())


def _count_blocks(sizes: Mapping[str, int], blocks: Mapping[str, int]) -> int:
    return math.prod(-(-size // blocks[f"BLOCK_{name}"]) for name, size in sizes.items())


def _count_shares(tokens: int, free: int, share: int, blocks: Mapping[str, int]) -> int:
    """The number of shares that the tokens x free of a gradient are split into."""
    return -(-_count_blocks({"T": tokens, "F": free}, blocks) // (share // (blocks["BLOCK_T"] * blocks["BLOCK_F"])))
