"""The Triton executor: products of structures on NVIDIA GPUs, forward and backward, from the plan of `steps.py` alone.

Two designs. *Steps*: one launch per factor; the state between two factors is written once, in a layout that both reach
in whole sectors. *Fused*: both factors of a term in one launch, the state between them stays on chip. The second is
taken where `fusing_pays` (tile_sizes.py). Going back, one launch per factor gives both gradients of a step wherever a
tile holds a whole matrix of the factor, so that nothing is read twice. docs/gpu-kernels.md counts the bytes.

This package can be imported without triton; `unsupported` says what is missing. Nothing here knows of autograd.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from einlinear.ops.triton_kernels import tile_sizes
from einlinear.ops.triton_kernels.steps import Layout, Step, count, plan, roles
from einlinear.ops.triton_kernels.tile_sizes import Tile
from einlinear.structures import Structure

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DESIGNS = ("steps", "fused")
OPTIONS = {"enable_fp_fusion": True}  # of the compiler; said since the default is about to change
TUNE = os.environ.get("EINLINEAR_TUNE") != "0"  # whether to measure which tiles are fastest, or take the first


def interpreting() -> bool:
    """Whether kernels are interpreted on the CPU. To be set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why these kernels cannot run, or None if they can. They know every structure."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"the Triton kernels compute in float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if interpreting():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 interprets kernels on the CPU"
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA devices (or the CPU with TRITON_INTERPRET=1), not on {device.type}"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels are written for NVIDIA GPUs of compute capability 8.0 or later"
    return None


def forward(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    bias: Tensor | None,
    save: bool,
    design: str | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """y = x W^T + bias for x of shape (n, in_features), and the states between factors, if they are to be saved.

    Args:
        structure: what the matrix is.
        factors, bias: of the dtype and device of x.
        x: any strides.
        save: whether to return what `backward` can reuse. It is opaque.
        design: "steps" or "fused" (ValueError where it does not fit); None takes the one that moves fewer bytes.
    """
    x = _unit_stride(x)
    if not len(x):
        return x.new_empty(0, structure.out_features), []
    y: Tensor | None = None
    saved: list[Tensor] = []
    for steps, (_, own) in zip(plan(structure), structure.by_term(factors), strict=True):
        weights = [factor.contiguous() for factor in own]
        y, states = _chain(steps, weights, x, bias if y is None else None, y, save, design)
        saved += states
    assert y is not None
    return y, saved


def backward(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    grad: Tensor,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_factors: Sequence[bool],
    design: str | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x and of the factors that are wanted, given that of y.

    Args:
        saved: what `forward` returned; if that is empty, states that are needed are computed again.
        needs_x, needs_factors: what is wanted; the rest is None.
        design: as in `forward`, where only the gradient of x is wanted.
    """
    x, grad = _unit_stride(x), _unit_stride(grad)
    if not len(x):
        zeros = [
            torch.zeros_like(factor) if need else None for factor, need in zip(factors, needs_factors, strict=True)
        ]
        return x.new_empty(x.shape) if needs_x else None, zeros
    states = iter(saved)
    grad_x: Tensor | None = None
    grad_factors: list[Tensor | None] = []
    parts = structure.by_term(list(zip(factors, needs_factors, strict=True)))
    for steps, (_, own) in zip(plan(structure), parts, strict=True):
        weights, needs = [factor.contiguous() for factor, _ in own], [need for _, need in own]
        between = [next(states) for _ in steps[1:]] if saved else []
        if any(needs):
            if any(needs[1:]) and not between:
                between = _between(steps, weights, x)
            grad_x, found = _chain_back(steps, weights, [x, *between], grad, grad_x, needs_x, needs)
            grad_factors += found
        else:
            if needs_x:
                back = tuple(step.transposed for step in reversed(steps))
                grad_x, _ = _chain(back, weights[::-1], grad, None, grad_x, False, design)
            grad_factors += [None] * len(steps)
    return grad_x, grad_factors


def _chain(
    steps: Sequence[Step],
    weights: Sequence[Tensor],
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    save: bool,
    design: str | None,
) -> tuple[Tensor, list[Tensor]]:
    """A term's output, plus the bias and the residual, and the states between its steps if they are to be saved."""
    if design not in (None, *DESIGNS):
        raise ValueError(f"unknown design {design!r}: choose {' or '.join(DESIGNS)}")
    if len(steps) == 2 and design != "steps":
        first, second = steps
        limits = tile_sizes.device_limits(x.device)
        if design is None and tile_sizes.fusing_pays(first, second, x.itemsize, len(x), limits, save):
            design = "fused"
        if design == "fused":
            if not tile_sizes.fused_tiles(first, second, x.itemsize, limits):
                raise ValueError("the state between these factors does not fit on the chip: choose the design 'steps'")
            return _launch_fused(first, second, weights, x, bias, residual, save)
    states = _between(steps, weights, x)
    y = _launch_step(steps[-1], weights[-1], (states or [x])[-1], len(x), bias, residual)
    return y, states if save else []


def _between(steps: Sequence[Step], weights: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """The states between the steps of a term."""
    states: list[Tensor] = []
    for step, weight in zip(steps[:-1], weights, strict=False):
        states.append(_launch_step(step, weight, (states or [x])[-1], len(x)))
    return states


def _chain_back(
    steps: Sequence[Step],
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    grad: Tensor,
    residual: Tensor | None,
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of a term's input, plus the residual, and those of its factors. states: what every step reads."""
    found: list[Tensor | None] = [None] * len(steps)
    n = len(grad)
    for i in reversed(range(len(steps))):
        step, weight, added = steps[i], weights[i], None if i else residual
        onward = needs_x or any(needs[:i])
        joint = onward and needs[i] and bool(_tiles_back(step, weight, n, joint=True))
        before = None
        if needs[i]:
            found[i], before = _launch_back(step, weight, states[i], grad, n, added if joint else None, joint)
        if not onward:
            return residual, found
        if not joint:
            before = _launch_step(step.transposed, weight, grad, n, None, added)
        assert before is not None
        grad = before
    return grad, found


def _launch_step(
    step: Step, weight: Tensor, x: Tensor, n: int, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    from einlinear.ops.triton_kernels.kernels import forward_step

    y = _new(step.result, n, x)
    source, result = _address(x, step.source), _address(y, step.result)
    blocks, bucket = _blocks(step, max(source[2], result[2])), _bucket(n)
    found = tile_sizes.forward_tiles(step, x.itemsize, bucket, tile_sizes.device_limits(x.device))
    _launch(forward_step, blocks, found, x, weight, bias, residual, y, *source, *result, bucket, **_constants(step, x))
    return y


def _launch_back(
    step: Step, weight: Tensor, x: Tensor, grad: Tensor, n: int, residual: Tensor | None, joint: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the factor and, if joint, that of the source."""
    from einlinear.ops.triton_kernels.kernels import backward_step

    grad_x = _new(step.source, n, x) if joint else None
    target = (0, 0, 0) if grad_x is None else _address(grad_x, step.source)
    source, result = _address(x, step.source), _address(grad, step.result)
    share = tile_sizes.share(step, x.itemsize, _bucket(n), tile_sizes.device_limits(x.device), joint)
    found = _tiles_back(step, weight, n, joint)
    splits = max(_shares(step, max(source[2], target[2], result[2]), share, dict(tile.blocks)) for tile in found)
    partial = weight.new_empty((splits, *weight.shape), dtype=torch.float32 if splits > 1 else weight.dtype)

    def programs(tile: Mapping[str, int]) -> int:
        rows, inner = _cdiv(step.counts[2], tile["BLOCK_R"]), _cdiv(step.counts[3], tile["BLOCK_K"])
        return splits * _cdiv(step.counts[0], tile["BLOCK_B"]) * rows * inner

    _launch(
        backward_step, programs, found,
        grad, weight, x, residual, grad_x, partial, *result, *source, *target, weight.numel(), _bucket(n),
        **_constants(step, x), SHARE=share,
    )  # fmt: skip
    return partial.sum(0).to(weight.dtype) if splits > 1 else partial[0], grad_x


def _launch_fused(
    first: Step,
    second: Step,
    weights: Sequence[Tensor],
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    from einlinear.ops.triton_kernels.kernels import forward_fused

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


def _tiles_back(step: Step, weight: Tensor, n: int, joint: bool) -> tuple[Tile, ...]:
    return tile_sizes.backward_tiles(step, weight.itemsize, _bucket(n), tile_sizes.device_limits(weight.device), joint)


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


def _blocks(step: Step, tokens: int) -> Callable[[Mapping[str, int]], int]:
    """The number of programs of a step forward, by its tile."""
    batch, columns, rows, _ = step.counts

    def programs(tile: Mapping[str, int]) -> int:
        shares = _cdiv(batch, tile["BLOCK_B"]) * _cdiv(columns, tile["BLOCK_C"]) * _cdiv(rows, tile["BLOCK_R"])
        return _cdiv(tokens, tile["BLOCK_T"]) * shares

    return programs


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


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
