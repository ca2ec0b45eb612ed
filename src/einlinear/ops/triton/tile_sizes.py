"""Sizes of the tiles that kernels work on.

Candidates fit the shared memory and the registers of the device. Which of them is fastest is measured on the device
(`triton.autotune`); the first is a fair choice where nothing can be measured.

The matrix product of a tile has m = tokens x free rows. b, f, n and k are as in `kernels.py`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch

from einlinear.ops.triton.strided_steps import SECTOR, StridedStep

# the shortest side of a tile that the matrix units take
MIN_SIDE = 16
# sums in one tile: 128 of the 255 registers of each of 256 threads
MAX_SUMS = 256 * 128
# The weight of a sum in a tile with a batch dimension, whose products keep more in registers, and in float32, whose
# exact products are made without the matrix units.
BATCHED_WEIGHT, FLOAT32_WEIGHT = 4, 8

# candidates for the two sides of a tile of sums
_SIDES = ((64, 64), (128, 64), (128, 128), (64, 128), (256, 64), (128, 256), (32, 64), (16, 64))
# candidates for m if the sides are given
_ROWS = (128, 64, 32)
# summands of a sum that are loaded at once, by the bytes of a number
_DEPTH = {2: 64, 4: 16}


class Device(NamedTuple):
    """The limits of a GPU.

    Attributes:
        processors: the number of streaming multiprocessors, all of which should be busy.
        shared: bytes of shared memory of one program.
    """

    processors: int
    shared: int


class Tile(NamedTuple):
    """One configuration of a kernel.

    Attributes:
        blocks: (name, size) pairs of the kernel's BLOCK_ arguments.
        warps: the number of warps.
        stages: the depth of the software pipeline.
    """

    blocks: tuple[tuple[str, int], ...]
    warps: int
    stages: int


@lru_cache
def device_limits(device: torch.device) -> Device:
    """The limits of a GPU; for the interpreter those of a small GPU with the shared memory of an H100."""
    if device.type != "cuda":
        return Device(4, 232_448)
    properties: Any = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)


@lru_cache(maxsize=4096)
def forward_tiles(step: StridedStep, itemsize: int, tokens: int, device: Device) -> tuple[Tile, ...]:
    """Tiles of `forward_step` for about this many tokens: the sums are m x n, the summands k."""
    block_b, block_f, weight = _fixed_blocks(step, itemsize)
    _, _, new, contracted = step.counts
    k = _clip(_DEPTH[itemsize], contracted)
    tiles = []
    for m, n in _SIDES:
        m, n = _clip_rows(m, tokens, block_f), _clip(n, new)
        while weight * m * n > MAX_SUMS:
            m, n = (m // 2, n) if m > max(n, block_f, MIN_SIDE) else (m, n // 2)
        stages = max(1, min(4, device.shared // (block_b * (m + n) * k * itemsize)))
        tiles.append(_tile(block_b, m // block_f, block_f, n, k, weight * m * n, stages))
    return tuple(dict.fromkeys(tiles))


@lru_cache(maxsize=4096)
def backward_tiles(step: StridedStep, itemsize: int, tokens: int, device: Device, joint: bool) -> tuple[Tile, ...]:
    """Tiles of `backward_step` for about this many tokens: the sums are n x k, the summands m.

    Joint tiles, which give the gradients of the factor and of the source, hold all of n and k. None may fit.
    """
    block_b, block_f, weight = _fixed_blocks(step, itemsize)
    _, _, new, contracted = step.counts
    sides = product([(_power(new), _power(contracted))], _ROWS) if joint else product(_SIDES, [_DEPTH[itemsize]])
    tiles = []
    for (n, k), m in sides:
        n, k, m = _clip(n, new), _clip(k, contracted), _clip_rows(m, tokens, block_f)
        while not joint and weight * n * k > MAX_SUMS:
            n, k = (n // 2, k) if n >= k else (n, k // 2)
        sums = weight * k * (n + m * joint)
        stages = min(3, (device.shared // itemsize // block_b - n * k * joint) // (m * (n + k)))
        if stages > 0 and sums <= MAX_SUMS:
            tiles.append(_tile(block_b, m // block_f, block_f, n, k, sums, stages))
    return tuple(dict.fromkeys(tiles))


def share(step: StridedStep, itemsize: int, tokens: int, device: Device, joint: bool) -> int:
    """The number of tokens x free that one program sums for the gradient of a factor.

    It leaves work for all processors. It is also so large that the partial sums, which are written and read in four
    bytes each, move at most half as much memory as source and result.
    """
    block_b, block_f, _ = _fixed_blocks(step, itemsize)
    batch, free, new, contracted = step.counts
    programs = math.ceil(batch / block_b) * (1 if joint else math.ceil(new / 64) * math.ceil(contracted / 64))
    busy = tokens * free * programs // (4 * device.processors)
    light = 16 * step.params * free // (itemsize * (step.source.features + step.result.features))
    return max(_clip_rows(_ROWS[0], tokens, block_f), _power(busy), _power(light))


def _fixed_blocks(step: StridedStep, itemsize: int) -> tuple[int, int, int]:
    """Blocks of batch and free axes that reach memory in whole sectors, and the weight of a sum in registers."""
    sector = SECTOR // itemsize
    block_b, block_f = min(_power(step.run(step.batch)), sector), min(_power(step.run(step.free)), 2 * sector)
    weight = max(BATCHED_WEIGHT if block_b > 1 else 1, FLOAT32_WEIGHT if itemsize == 4 else 1)
    return block_b, block_f, block_b * weight


def _tile(b: int, t: int, f: int, n: int, k: int, sums: int, stages: int) -> Tile:
    blocks = {"BLOCK_B": b, "BLOCK_T": t, "BLOCK_F": f, "BLOCK_N": n, "BLOCK_K": k}
    return Tile(tuple(blocks.items()), 4 if sums <= MAX_SUMS // 4 else 8, stages)


def _clip_rows(m: int, tokens: int, block_f: int) -> int:
    """Rows of a tile: no more than the tokens need, but a whole block of free axes."""
    return max(block_f, _clip(m, tokens * block_f))


def _clip(side: int, size: int) -> int:
    """A side of a tile that is no longer than the size needs."""
    return max(MIN_SIDE, min(side, _power(size)))


def _power(size: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(size - 1, 0).bit_length()
