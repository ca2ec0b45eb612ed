"""How large tiles may be, and which design is worth it: from the sizes and the device's limits, by counting bytes.

Candidates that do not fit into the shared memory or the registers are left out here; which of the rest is fastest is
measured (`triton.autotune`). The first candidate is a fair one where nothing can be measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch

from einlinear.ops.triton.steps import SECTOR, Layout, Step, count, roles

SMALLEST = 16  # the shortest side of a tile that the matrix units take
LARGEST = 256 * 128  # sums in one tile: 128 of the 255 registers of each of 256 threads
BATCHED = 4  # what a sum counts for in a tile with a batch dimension, whose products keep more in registers
SINGLE = 8  # what it counts for in float32, whose exact products are made without the matrix units
L2_SPEED = 1.5  # of the second-level cache, relative to device memory: about that on Hopper, to be measured
GAIN = 0.9  # of the time of two launches: what one must stay below, for its programs are fewer and longer

_SHAPES = ((64, 64), (128, 64), (128, 128), (64, 128), (256, 64), (128, 256), (32, 64), (16, 64))  # rows x columns
_LONGEST = 128  # rows of a tile of `backward_step`
_DEPTH = {2: 64, 4: 16}  # how much of a sum a tile makes at once, by the bytes of a number


class Device(NamedTuple):
    """What bounds a kernel: the processors to keep busy, and the shared memory (bytes) of one program."""

    processors: int
    shared: int


class Tile(NamedTuple):
    """One way to run a kernel: its block sizes by name, its warps and the depth of its pipeline."""

    blocks: tuple[tuple[str, int], ...]
    warps: int
    stages: int


class Fused(NamedTuple):
    """A tile of a fused pair, its tokens, the number of programs that share them, and the bytes it moves per token."""

    tile: Tile
    tokens: int
    programs: int
    bytes: float


@lru_cache
def device_limits(device: torch.device) -> Device:
    """The limits of a GPU; in the interpreter those of an imaginary one, small but with an H100's shared memory."""
    if device.type != "cuda":
        return Device(4, 232_448)
    properties: Any = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)


@lru_cache(maxsize=4096)
def forward_tiles(step: Step, itemsize: int, tokens: int, device: Device) -> tuple[Tile, ...]:
    """Tiles of `forward_step` for about this many tokens."""
    block_b, block_c, weight = _runs(step, itemsize)
    _, _, rows, inner = step.counts
    tiles = []
    for m, r in _SHAPES:
        m, r, k = _rows(m, tokens, block_c), _clip(r, rows), _clip(_DEPTH[itemsize], inner)
        while weight * m * r > LARGEST:
            m, r = (m // 2, r) if m > max(r, block_c, SMALLEST) else (m, r // 2)
        stages = max(1, min(4, device.shared // (block_b * (m + r) * k * itemsize)))
        tiles.append(_tile(stages, weight * m * r, B=block_b, T=m // block_c, C=block_c, R=r, K=k))
    return tuple(dict.fromkeys(tiles))


@lru_cache(maxsize=4096)
def backward_tiles(step: Step, itemsize: int, tokens: int, device: Device, joint: bool) -> tuple[Tile, ...]:
    """Tiles of `backward_step`; joint: for both gradients at once, none if a tile cannot hold a whole matrix."""
    block_b, block_c, weight = _runs(step, itemsize)
    _, _, rows, inner = step.counts
    shapes = [(_power(rows), _power(inner))] if joint else [*_SHAPES]
    tiles = []
    for (r, k), m in product(shapes, (_LONGEST, 64, 32) if joint else (_DEPTH[itemsize],)):
        r, k, m = _clip(r, rows), _clip(k, inner), _rows(m, tokens, block_c)
        while not joint and weight * r * k > LARGEST:
            r, k = (r // 2, k) if r >= k else (r, k // 2)
        sums = weight * k * (r + m * joint)
        stages = min(3, (device.shared // itemsize // block_b - r * k * joint) // (m * (r + k)))
        if stages > 0 and sums <= LARGEST:
            tiles.append(_tile(stages, sums, B=block_b, T=m // block_c, C=block_c, R=r, K=k))
    return tuple(dict.fromkeys(tiles))


def share(step: Step, itemsize: int, tokens: int, device: Device, joint: bool) -> int:
    """How many tokens x columns a program sums for a factor's gradient.

    As many as leave work for all processors; but so many that the partial sums, which are written and read in four
    bytes each, move at most half as much as the states.
    """
    block_b, block_c, _ = _runs(step, itemsize)
    batch, columns, rows, inner = step.counts
    programs = math.ceil(batch / block_b) * (1 if joint else math.ceil(rows / 64) * math.ceil(inner / 64))
    busy = tokens * columns * programs // (4 * device.processors)
    light = 16 * step.params * columns // (itemsize * (step.source.features + step.result.features))
    return max(_rows(_LONGEST, tokens, block_c), _power(busy), _power(light))


@lru_cache(maxsize=4096)
def fused_tiles(first: Step, second: Step, itemsize: int, device: Device) -> tuple[Fused, ...]:
    """Tiles of `forward_fused`, which keep the intermediate on chip: those that move the fewest bytes first."""
    n = {role: count(group) for role, group in roles(first, second)._asdict().items()}
    sides = product(_powers(128), _powers(_power(n["f"])), _powers(_power(n["d"])))
    found = (_fused(first, second, n, t, f, d, itemsize, device) for t, f, d in sides)
    return tuple(sorted(filter(None, found), key=lambda candidate: candidate.bytes)[:6])


def _fused(
    first: Step, second: Step, n: dict[str, int], t: int, f: int, d: int, itemsize: int, device: Device
) -> Fused | None:
    """The tile with so many entries of t, f and d, if it fits."""
    b, g = _power(n["b"]), _power(n["g"])
    r = max(_power(n["r"]), SMALLEST // (f * d), SMALLEST // (g * b))
    a, e = _clip(_DEPTH[itemsize], n["a"]), _clip(64, n["e"])
    weight = SINGLE if itemsize == 4 else 1
    z, y = weight * g * t * b * r * f * d * (1 + (g > 1)), weight * f * t * d * (1 + (f > 1))  # y: for one entry of e
    if t * b < SMALLEST or t * d < SMALLEST or max(z, y * SMALLEST) > LARGEST:
        return None
    e = min(e, LARGEST // y)
    stage = g * a * (t * b + r * f * d) * itemsize
    if max(2 * stage, g * b * r * f * (t * d + 2 * e) * itemsize) > device.shared:
        return None
    d_blocks = math.ceil(n["d"] / d)
    shares = math.ceil(n["f"] / f) * d_blocks
    blocks = {axis: f if axis in first.rows else 1 for axis in second.batch}
    blocks |= {axis: d if axis in first.rows else 1 for axis in second.columns}
    read = first.source.features * shares * _waste(first.source, blocks, itemsize)
    written = second.result.features * _waste(second.result, blocks, itemsize)
    factors = (first.params + second.params * d_blocks) / t
    tile = _tile(min(4, device.shared // stage), max(z, y * e), T=t, A=a, D=d, E=e, F=f, ALL_B=b, ALL_G=g, ALL_R=r)
    return Fused(tile, t, n["outer"] * shares, (read + written + factors) * itemsize)


def fusing_pays(first: Step, second: Step, itemsize: int, tokens: int, device: Device, save: bool) -> bool:
    """Whether one launch moves its bytes sooner than two do, and has work for all processors.

    Two launches write the intermediate and read it again. A fused program has few tokens, so that it reads the factors
    more often, and perhaps the input: from the second-level cache, which is faster, but not by much. In float32 it
    never pays: without matrix units, the second product of a fused program needs more registers than there are.
    """
    if itemsize == 4:
        return False
    candidates = fused_tiles(first, second, itemsize, device)
    busy = [fused for fused in candidates if math.ceil(tokens / fused.tokens) * fused.programs >= device.processors]
    if not busy:
        return False
    ends, middle = first.source.features + second.result.features, first.result.features
    factors = (first.params + second.params) / 128
    apart = max(ends + 2 * middle, (ends + 2 * middle + factors) / L2_SPEED)
    together = max(ends + middle * save, (busy[0].bytes / itemsize + middle * save) / L2_SPEED)
    return together < GAIN * apart


def _runs(step: Step, itemsize: int) -> tuple[int, int, int]:
    """The blocks of batch and columns, so that memory is reached in whole sectors, and what an entry's sum counts."""
    sector = SECTOR // itemsize
    block_b, block_c = min(_power(step.run("batch")), sector), min(_power(step.run("columns")), 2 * sector)
    return block_b, block_c, block_b * max(BATCHED if block_b > 1 else 1, SINGLE if itemsize == 4 else 1)


def _waste(layout: Layout, blocks: Mapping[str, int], itemsize: int) -> float:
    """How many bytes are moved for each that is wanted, where a program has only so many entries of some axes."""
    unit = layout.unit
    if unit is None or unit not in blocks:
        return 1
    return max(1, min(dict(layout.sizes)[unit], SECTOR // itemsize) / blocks[unit])


def _rows(m: int, tokens: int, block_c: int) -> int:
    """A tile's rows: no more than there are tokens for, but whole runs of columns."""
    return max(block_c, _clip(m, tokens * block_c))


def _tile(stages: int, sums: int, **blocks: int) -> Tile:
    named = {name if name.startswith("ALL") else f"BLOCK_{name}": block for name, block in blocks.items()}
    return Tile(tuple(named.items()), 4 if sums <= LARGEST // 4 else 8, stages)


def _clip(side: int, size: int) -> int:
    """A side of a tile that is no longer than the size needs."""
    return max(SMALLEST, min(side, _power(size)))


def _power(size: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(size - 1, 0).bit_length()


def _powers(largest: int) -> list[int]:
    return [1 << exponent for exponent in range(largest.bit_length())]
