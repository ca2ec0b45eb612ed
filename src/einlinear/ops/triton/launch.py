"""Launches of the kernels: the plan of their steps with sizes and strides as numbers, tiles, programs, arguments.

A kernel walks each group of axes (batch, contracted, free, new) by one flat index and finds the index of every axis by
division. Any order of axes is read and written in place. Axes that are neighbours in all tensors are merged first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from einlinear.structures import Factor, Structure
from einlinear.structures.pattern import Axes

# for each axis, slowest first: its size, its strides in the factor, the source and the result (0 where it is absent)
Group = tuple[tuple[int, ...], ...]

# bytes that the memory of a GPU moves at once
SECTOR = 32
# options of the compiler; written out since the default is about to change
OPTIONS = {"enable_fp_fusion": True}
# whether to measure which of the candidate tiles is fastest, or to take the first
TUNE = os.environ.get("EINLINEAR_TUNE") != "0"
# the tokens of a tile never exceed a block of slots, which belongs to one expert
BLOCK_SLOTS = 64
# bytes of shared memory that every supported GPU has for one program; tuning drops tiles that need more
SHARED = 101_376

# candidates for the two sides of a tile of sums, and the summands that are loaded at once, by the bytes of a number
_SIDES = ((64, 64), (128, 64), (64, 128), (128, 128), (32, 64), (16, 64), (32, 32), (16, 16))
_DEPTH = {2: 64, 4: 16}
# the shortest side of a tile that the matrix units take; sums in a tile: 128 of 255 registers of each of 256 threads
_MIN_SIDE, _MAX_SUMS = 16, 256 * 128


@dataclass(frozen=True, eq=False)
class Layout:
    """The layout of an input, intermediate or output: axes, slowest first; tokens are the slowest or the fastest."""

    axes: Axes
    sizes: Mapping[str, int]
    # those that exist; the rest, up to the product of the sizes of the axes, is padding
    features: int
    tokens_last: bool = False

    @property
    def fastest_axis(self) -> str | None:
        """The axis whose entries are neighbours in memory; None for the tokens."""
        long = [axis for axis in self.axes if self.sizes[axis] > 1]
        return None if self.tokens_last or not long else long[-1]

    @property
    def limit(self) -> int:
        """The number of features if there is padding, else 0."""
        return self.features if self.features < math.prod(self.sizes[axis] for axis in self.axes) else 0


@dataclass(frozen=True, eq=False)
class StridedStep:
    """The contraction of one factor: its axes, their groups as in `structures.Factor`, and the layouts of both ends."""

    factor: Axes
    batch: Axes
    free: Axes
    new: Axes
    contracted: Axes
    source: Layout
    result: Layout

    @cached_property
    def transposed(self) -> StridedStep:
        """The step from the gradient of the result to the gradient of the source."""
        return replace(self, new=self.contracted, contracted=self.new, source=self.result, result=self.source)

    @cached_property
    def groups(self) -> dict[str, Group]:
        """The groups as constants of the kernels."""
        groups = {"BATCH": self.batch, "FREE": self.free, "NEW": self.new, "CONTRACTED": self.contracted}
        return {name: self._group(axes) for name, axes in groups.items()}

    @cached_property
    def counts(self) -> dict[str, int]:
        """The number of entries of each group."""
        return {name: math.prod(axis[0] for axis in group) for name, group in zip("BFNK", self.groups.values())}

    def run(self, axes: Axes) -> int:
        """Return the number of features of a group that are neighbours in the source or the result."""
        fastest = self.source.fastest_axis, self.result.fastest_axis
        return max((self.source.sizes[axis] for axis in axes if axis in fastest), default=1)

    def _group(self, axes: Axes) -> Group:
        """The sizes and strides of a group, neighbours merged; never empty."""
        sizes = self.source.sizes
        tensors = (self.factor[::-1], self.source.axes[::-1], self.result.axes[::-1])
        strides = [dict(zip(t, accumulate((sizes[axis] for axis in t), mul, initial=1))) for t in tensors]
        # in the order of the factor, where most axes merge; the fastest axis of the source or the result last
        order, fastest = (*self.factor, *self.source.axes), (self.source.fastest_axis, self.result.fastest_axis)
        merged: list[tuple[int, ...]] = []
        for axis in sorted(axes, key=lambda axis: (axis in fastest, order.index(axis))):
            entry = (sizes[axis], *(tensor.get(axis, 0) for tensor in strides))
            if entry[0] == 1:
                continue
            if merged and all(slow == fast * entry[0] for slow, fast in zip(merged[-1][1:], entry[1:], strict=True)):
                entry = (merged.pop()[0] * entry[0], *entry[1:])
            merged.append(entry)
        return tuple(merged) or ((1, 0, 0, 0),)


@lru_cache(maxsize=4096)
def strided_steps(structure: Structure) -> tuple[tuple[StridedStep, ...], ...]:
    """The steps of every term. Inputs and outputs are token-major."""
    sizes, terms = dict(structure.sizes), []
    for term in structure.terms:
        between = (_between(first, second, sizes) for first, second in pairwise(term.factors))
        outputs = Layout(term.outputs, sizes, structure.out_features)
        layouts = pairwise((Layout(term.inputs, sizes, structure.in_features), *between, outputs))
        steps = zip(term.factors, layouts, strict=True)
        terms.append(tuple(StridedStep(f.axes, f.batch, f.free, f.new, f.contracted, *ends) for f, ends in steps))
    return tuple(terms)


def _between(first: Factor, second: Factor, sizes: Mapping[str, int]) -> Layout:
    """The layout of an intermediate that both steps reach in runs of a sector: of a long new axis, or of tokens."""
    axes = (*first.batch, *first.free, *first.new)
    long = [axis for axis in first.new if 2 * sizes[axis] >= SECTOR and axis not in second.batch]
    if not long:
        return Layout(axes, sizes, first.result_size, tokens_last=True)
    last = max(long, key=lambda axis: (axis in second.contracted, sizes[axis]))
    return Layout((*(axis for axis in axes if axis != last), last), sizes, first.result_size)


class Slots(NamedTuple):
    """Rows of tokens, sorted by expert, in blocks of BLOCK_SLOTS that belong to one expert each."""

    # (n, active), the slot of every pair of a token and an expert
    positions: Tensor
    # (blocks,) int32, the expert of every block
    experts: Tensor
    # (number of experts + 1,) int32, the first slot of each expert, and the end
    starts: Tensor


class Epilogue(NamedTuple):
    """What a step does with its result before it writes it: activation(result + bias + addend) * multiplier.

    The addend and the multiplier are of the shape of the result, of a step that ends in token-major memory. None of
    them may be `out`, since tuning runs a kernel many times.
    """

    bias: Tensor | None = None
    addend: Tensor | None = None
    # one of `ops.ACTIVATIONS`
    activation: str = "identity"
    multiplier: Tensor | None = None
    # contiguous; None: new memory
    out: Tensor | None = None


NO_EPILOGUE = Epilogue()


class Tile(NamedTuple):
    """One configuration of a kernel: (name, size) pairs of its BLOCK_ arguments, warps, depth of the pipeline."""

    blocks: tuple[tuple[str, int], ...]
    warps: int
    stages: int


def interpreting() -> bool:
    """Return whether kernels are interpreted on the CPU. The variable must be set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def multiply(
    step: StridedStep,
    weight: Tensor,
    source: Tensor,
    epilogue: Epilogue = NO_EPILOGUE,
    slots: Slots | None = None,
) -> Tensor:
    """Return the result of a step. With slots, the weight is stacked, and the rows of the source are slots."""
    from einlinear.ops.triton.kernels import forward_step

    tokens, features = source.shape[1 if step.source.tokens_last else 0], step.result.features
    bias, addend, activation, multiplier, result = epilogue
    if result is None:
        result = source.new_empty((features, tokens) if step.result.tokens_last else (tokens, features))
    if not tokens:
        return result
    # as the kernel reads them
    bias, addend, multiplier = (None if t is None else t.contiguous() for t in (bias, addend, multiplier))
    sizes = {"T": tokens, "B": step.counts["B"], "F": step.counts["F"], "N": step.counts["N"]}
    tiles = _tiles(step, source.dtype, BLOCK_SLOTS if slots else _padded(tokens), False)
    _launch(
        forward_step, sizes, tiles, source, weight, bias, addend, multiplier, result, slots and slots.experts, tokens,
        *_strides(source, step.source), *_strides(result, step.result), _padded(tokens),
        **_constants(step, source.dtype), BLOCK_SLOTS=BLOCK_SLOTS, ACTIVATION=activation,
    )  # fmt: skip
    return result


def gradient_of_factor(
    step: StridedStep,
    weight: Tensor,
    source: Tensor,
    grad: Tensor,
    slots: Slots | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the gradient of a step's factor, given that of its result. Partial sums are added in a fixed order.

    The gradient is of a dtype: by default, that of the weight.
    """
    from einlinear.ops.triton.kernels import factor_gradient

    tokens = source.shape[1 if step.source.tokens_last else 0]
    if not tokens:
        return torch.zeros_like(weight, dtype=dtype)
    dtype = dtype or weight.dtype
    share = share_of_tokens(step, source.itemsize)
    # the slots of each expert are summed by one program
    splits = len(weight) if slots else -(-tokens // share)
    partial = slots is None and splits > 1
    shape = weight.shape if slots else (splits, *weight.shape)
    result = weight.new_empty(shape, dtype=torch.float32 if partial else dtype)
    sizes = {"SPLITS": splits, "B": step.counts["B"], "N": step.counts["N"], "K": step.counts["K"]}
    tiles = _tiles(step, source.dtype, BLOCK_SLOTS if slots else _padded(tokens), True)
    _launch(
        factor_gradient, sizes, tiles, grad, source, result, slots and slots.starts, tokens,
        *_strides(grad, step.result), *_strides(source, step.source), _padded(tokens),
        **_constants(step, source.dtype), SHARE=share,
    )  # fmt: skip
    if partial:
        return result.sum(0).to(dtype)
    return result if slots else result[0]


def share_of_tokens(step: StridedStep, itemsize: int) -> int:
    """The tokens that one program sums, so that partial sums in float32 move at most half as much as the operands."""
    params = math.prod(step.source.sizes[axis] for axis in step.factor)
    return max(128, _power(16 * params // (itemsize * (step.source.features + step.result.features))))


@lru_cache(maxsize=4096)
def _tiles(step: StridedStep, dtype: torch.dtype, tokens: int, gradient: bool) -> tuple[Tile, ...]:
    """The candidates that fit the registers of a GPU, for about this many tokens; the first fits any shared memory."""
    itemsize, counts = dtype.itemsize, step.counts
    # blocks of batch and free axes that reach memory in whole sectors
    sector = SECTOR // itemsize
    b, f = min(_power(step.run(step.batch)), sector), min(_power(step.run(step.free)), 2 * sector)
    # batched products keep more in registers, and exact products of float32 do not use the matrix units
    weight = max(4 if b > 1 else 1, 8 if itemsize == 4 else 1)
    tiles = []
    for first, second in _SIDES:
        # the sums are m x n and the summands k, with m = tokens x free; for a gradient, n x k and m
        m, n, k = (_DEPTH[itemsize], first, second) if gradient else (first, second, _DEPTH[itemsize])
        m, n, k = max(f, min(m, tokens * f)), min(n, _padded(counts["N"])), min(k, _padded(counts["K"]))
        sums, loaded = (n * k, m * (n + k)) if gradient else (m * n, (m + n) * k)
        stages = max(1, min(3, SHARED // (b * loaded * itemsize)))
        if b * weight * sums <= _MAX_SUMS:
            blocks = {"BLOCK_B": b, "BLOCK_T": m // f, "BLOCK_F": f, "BLOCK_N": n, "BLOCK_K": k}
            tiles.append(Tile(tuple(blocks.items()), 4 if b * weight * sums <= _MAX_SUMS // 4 else 8, stages))
    return tuple(dict.fromkeys(tiles))


def _launch(kernel: Any, sizes: Mapping[str, int], tiles: Sequence[Tile], *args: Any, **constants: Any) -> None:
    """Run a kernel, a program per block of these sizes, with the fastest tile, or the first if none is measured."""

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        return (math.prod(-(-size // blocks.get(f"BLOCK_{name}", 1)) for name, size in sizes.items()),)

    with torch.cuda.device_of(args[0]):
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


def _constants(step: StridedStep, dtype: torch.dtype) -> dict[str, Any]:
    limits = {"SOURCE_LIMIT": step.source.limit, "RESULT_LIMIT": step.result.limit}
    return {**step.groups, **step.counts, **limits, "PRECISION": _precision(dtype)}


def _precision(dtype: torch.dtype) -> str:
    """The precision of products: torch's own setting for float32."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    precision = "tf32" if allowed and dtype == torch.float32 else "ieee"
    return "widen" if interpreting() else precision


def _strides(tensor: Tensor, layout: Layout) -> tuple[int, int]:
    """The strides of tokens and of features."""
    return (tensor.stride(1), tensor.stride(0)) if layout.tokens_last else (tensor.stride(0), tensor.stride(1))


def _padded(size: int) -> int:
    """The longest side of a tile that a size needs; of tokens, what tuning distinguishes."""
    return max(_MIN_SIDE, _power(size))


def _power(size: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(size - 1, 0).bit_length()
