"""The launches: one step forward, one step back, two steps forward at once. Which tile, how many programs, what memory.

Where tokens are sorted by expert (`slots.py`), weights are stacked, the states between steps have a row for every slot,
and the first and the last step find the rows of tokens and pairs by themselves: nothing is gathered or scattered apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from einlinear.ops.triton import tile_sizes
from einlinear.ops.triton.slots import Rows, Slots
from einlinear.ops.triton.steps import Layout, Step, count, roles
from einlinear.ops.triton.tile_sizes import Tile

OPTIONS = {"enable_fp_fusion": True}  # of the compiler; said since the default is about to change
TUNE = os.environ.get("EINLINEAR_TUNE") != "0"  # whether to measure which tiles are fastest, or take the first


def interpreting() -> bool:
    """Whether kernels are interpreted on the CPU. To be set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launch_step(
    step: Step,
    weight: Tensor,
    x: Tensor,
    n: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    slots: Slots | None = None,
    x_rows: Rows | None = None,
    y_rows: Rows | None = None,
) -> Tensor:
    """The state after a step, plus the bias and the residual, which lies like it.

    Args:
        step: which.
        weight: its factor; stacked where there are slots.
        x: the state before it.
        n: the number of tokens, or of slots.
        slots: of pairs of tokens and experts.
        x_rows, y_rows: where these lie in x and in the result; None: there is a row for every slot.
    """
    from einlinear.ops.triton.kernels import forward_step

    y = _new(step.result, n if y_rows is None else y_rows.total, x)
    source, result = _address(x, step.source), _address(y, step.result)
    tokens = max(source[2], result[2]) if slots is None else n
    found = tile_sizes.forward_tiles(step, x.itemsize, _most(n, slots), tile_sizes.device_limits(x.device))
    _launch(
        forward_step, _programs(step, tokens), found,
        x, weight, bias, residual, y, *_given(x_rows), _given(y_rows)[0], None if slots is None else slots.experts,
        *source, *result, step.params, _bucket(n), **_constants(step, x), UNIT=0 if slots is None else slots.unit,
    )  # fmt: skip
    return y


def launch_back(
    step: Step,
    weight: Tensor,
    x: Tensor,
    grad: Tensor,
    n: int,
    residual: Tensor | None,
    joint: bool,
    slots: Slots | None = None,
    x_rows: Rows | None = None,
    grad_rows: Rows | None = None,
    grad_x_rows: Rows | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the factor and, if joint, that of the source, plus the residual.

    Args:
        step, weight, x, n, slots: as in `launch_step`.
        grad: of the state after the step.
        joint: only where `tiles_back` finds any.
        x_rows, grad_rows, grad_x_rows: where slots lie in x, in grad and in the gradient of x.
    """
    from einlinear.ops.triton.kernels import backward_step

    grad_x = _new(step.source, n if grad_x_rows is None else grad_x_rows.total, x) if joint else None
    target = (0, 0, 0) if grad_x is None else _address(grad_x, step.source)
    source, result = _address(x, step.source), _address(grad, step.result)
    found = tiles_back(step, weight, n, joint, slots)
    if slots is None:
        share = tile_sizes.share(step, x.itemsize, _bucket(n), tile_sizes.device_limits(x.device), joint)
        splits = max(_shares(step, max(source[2], target[2], result[2]), share, dict(tile.blocks)) for tile in found)
        partial = weight.new_empty((splits, *weight.shape), dtype=torch.float32 if splits > 1 else weight.dtype)
    else:  # every expert is summed by itself
        share, splits, partial = 0, len(weight), torch.empty_like(weight)

    def programs(tile: Mapping[str, int]) -> int:
        rows, inner = _cdiv(step.counts[2], tile["BLOCK_R"]), _cdiv(step.counts[3], tile["BLOCK_K"])
        return splits * _cdiv(step.counts[0], tile["BLOCK_B"]) * rows * inner

    _launch(
        backward_step, programs, found,
        grad, weight, x, residual, grad_x, partial,
        _given(grad_rows)[0], *_given(x_rows), _given(grad_x_rows)[0], None if slots is None else slots.starts,
        *result, *source, *target, step.params, _bucket(n),
        **_constants(step, x), SHARE=share, UNIT=0 if slots is None else slots.unit,
    )  # fmt: skip
    if slots is not None:
        return partial, grad_x
    return partial.sum(0).to(weight.dtype) if splits > 1 else partial[0], grad_x


def tiles_back(step: Step, weight: Tensor, n: int, joint: bool, slots: Slots | None = None) -> tuple[Tile, ...]:
    """The tiles of `launch_back`; none where no tile holds a whole matrix of the factor, as joint needs it."""
    limits = tile_sizes.device_limits(weight.device)
    return tile_sizes.backward_tiles(step, weight.itemsize, _most(n, slots), limits, joint)


def launch_fused(
    first: Step,
    second: Step,
    weights: Sequence[Tensor],
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The state after two steps, plus the bias and the residual, and the state between them if that is to be saved."""
    from einlinear.ops.triton.kernels import forward_fused

    y = _new(second.result, len(x), x)
    z = _new(first.result, len(x), x) if save else None
    source, result = _address(x, first.source), _address(y, second.result)
    middle = (0, 0, 0) if z is None else _address(z, first.result)
    groups = {role.upper(): group for role, group in roles(first, second)._asdict().items()}
    sizes = {f"N_{role}": count(group) for role, group in groups.items()}
    limits = tile_sizes.device_limits(x.device)

    def programs(tile: Mapping[str, int]) -> int:
        shares = _cdiv(sizes["N_F"], tile["BLOCK_F"]) * _cdiv(sizes["N_D"], tile["BLOCK_D"])
        return _cdiv(max(source[2], middle[2]), tile["BLOCK_T"]) * sizes["N_OUTER"] * shares

    _launch(
        forward_fused, programs,
        tuple(fused.tile for fused in tile_sizes.fused_tiles(first, second, x.itemsize, limits)),
        x, *weights, bias, residual, z, y, *source, *middle, *result, _bucket(len(x)),
        **groups, **sizes, X_LIMIT=first.source.limit, Y_LIMIT=second.result.limit, PRECISION=_precision(x.dtype),
    )  # fmt: skip
    return y, [] if z is None else [z]


def _launch(
    kernel: Any, programs: Callable[[Mapping[str, int]], int], found: tuple[Tile, ...], *args: Any, **constants: Any
) -> None:
    """Run a kernel with the fastest of these tiles, or the first of them where none is measured."""
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device_of(tensor):

        def grid(tile: Mapping[str, int]) -> tuple[int]:
            return (programs(tile),)

        if TUNE and not interpreting():
            _tuned(kernel, found, tuple(constants))[grid](*args, **constants, **OPTIONS)
        else:
            options = {"num_warps": found[0].warps, "num_stages": found[0].stages, **OPTIONS}
            kernel[grid](*args, **constants, **dict(found[0].blocks), **options)


@lru_cache(maxsize=4096)
def _tuned(kernel: Any, found: tuple[Tile, ...], constants: tuple[str, ...]) -> Any:
    """The kernel, tuned on first use for each structure, dtype and power of two of tokens; remembered on disk."""
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]

    configs = [triton.Config(dict(tile.blocks), num_warps=tile.warps, num_stages=tile.stages) for tile in found]
    return triton.autotune(configs, key=["bucket", *constants], cache_results=True)(kernel)


def _shares(step: Step, tokens: int, share: int, tile: Mapping[str, int]) -> int:
    """Into how many shares the tokens and columns are split."""
    block_t, block_c = tile["BLOCK_T"], tile["BLOCK_C"]
    return _cdiv(_cdiv(tokens, block_t) * _cdiv(step.counts[1], block_c), share // (block_t * block_c))


def _constants(step: Step, x: Tensor) -> dict[str, Any]:
    named = {name.upper(): group for name, group in step.groups._asdict().items()}
    sizes = dict(zip("BCRK", step.counts, strict=True))
    limits = {"X_LIMIT": step.source.limit, "Y_LIMIT": step.result.limit}
    return {**named, **sizes, **limits, "PRECISION": _precision(x.dtype)}


def _precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: as torch is told to compute its own."""
    if interpreting():
        return "widen"
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed and dtype == torch.float32 else "ieee"


def _programs(step: Step, tokens: int) -> Callable[[Mapping[str, int]], int]:
    """The number of programs of a step forward, by its tile."""
    batch, columns, rows, _ = step.counts

    def programs(tile: Mapping[str, int]) -> int:
        shares = _cdiv(batch, tile["BLOCK_B"]) * _cdiv(columns, tile["BLOCK_C"]) * _cdiv(rows, tile["BLOCK_R"])
        return _cdiv(tokens, tile["BLOCK_T"]) * shares

    return programs


def _most(n: int, slots: Slots | None) -> int:
    """How many tokens a tile may have, at most."""
    return _bucket(n) if slots is None else slots.unit


def _given(rows: Rows | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if rows is None else (rows.numbers, rows.gates)


def _bucket(n: int) -> int:
    """The number of tokens as far as tuning cares."""
    return max(16, 1 << (n - 1).bit_length())


def _new(layout: Layout, n: int, like: Tensor) -> Tensor:
    """Memory for a state. Tokens that lie next to each other are padded to whole sectors, with zeros by the kernels."""
    return like.new_empty((layout.features, _cdiv(n, 16) * 16) if layout.tokens_last else (n, layout.features))


def _address(state: Tensor, layout: Layout) -> tuple[int, int, int]:
    """The strides of a state's tokens and features, and the number of tokens, padding included."""
    if layout.tokens_last:
        return 1, state.stride(0), state.shape[1]
    return state.stride(0), 1, state.shape[0]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
