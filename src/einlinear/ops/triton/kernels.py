# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The kernels: one contraction step forward, and one step backward.

Shapes, with b, f, n, k the flat indices of the batch, free, new and contracted axes, and t that of the tokens:

    source (b, t f, k)    factor (b, k, n)    result (b, t f, n)

A source or result is a pointer, the strides of its tokens and of its features, and its number of tokens. A group of
axes is a tuple of (size, stride in the factor, in the source, in the result), see `strided_steps.py`. Sizes and strides
of the groups are constants of the compiled kernel, so the compiler sees which entries are neighbours in memory.

With a routing, tokens are slots (`slots.py`): each block of BLOCK_SLOTS of them belongs to one expert, whose weights
are read. `*_rows` are the rows of the slots in a source or result that has rows of tokens or pairs.

The rows of a tile are tokens x free. If BLOCK_B > 1, the tile has a batch dimension in front.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

# positions of the strides in a group
FACTOR, SOURCE, RESULT = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def forward_step(
    source, factor, bias, residual, result,
    source_rows, gates, result_rows, experts,
    source_token, source_feature, source_tokens,
    result_token, result_feature, result_tokens, params, bucket,
    BATCH: tl.constexpr, FREE: tl.constexpr, NEW: tl.constexpr, CONTRACTED: tl.constexpr,
    B: tl.constexpr, F: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    SOURCE_LIMIT: tl.constexpr, RESULT_LIMIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """result[b, t f, n] = sum_k gate_t source[b, t f, k] factor[b, k, n] (+ bias) (+ residual, with result's layout)"""
    BATCHED: tl.constexpr = BLOCK_B > 1
    N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    B_BLOCKS: tl.constexpr = (B + BLOCK_B - 1) // BLOCK_B
    F_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    # The tokens are slowest, so that programs that run together read the same tokens.
    program = tl.program_id(0)
    b = _batch(program // N_BLOCKS % B_BLOCKS, BLOCK_B)
    n = program % N_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    program = program // (N_BLOCKS * B_BLOCKS)
    m = tl.arange(0, BLOCK_T * BLOCK_F)
    f = program % F_BLOCKS * BLOCK_F + m % BLOCK_F
    t = program // F_BLOCKS * BLOCK_T + m // BLOCK_F
    if experts is not None:
        expert = tl.load(experts + program // F_BLOCKS * BLOCK_T // BLOCK_SLOTS)
        if expert < 0:
            return
        factor += expert.to(tl.int64) * params
    source_t, in_source = _rows(source_rows, t, source_tokens)
    result_t, in_result = _rows(result_rows, t, result_tokens)
    if gates is not None:
        gate = tl.load(gates + t)

    source_b, source_f, factor_b = _offsets(b, BATCH, SOURCE), _offsets(f, FREE, SOURCE), _offsets(b, BATCH, FACTOR)
    factor_n = _offsets(n, NEW, FACTOR)
    total = _zeros(BLOCK_B, BLOCK_T * BLOCK_F, BLOCK_N)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        source_k, factor_k = _offsets(k, CONTRACTED, SOURCE), _offsets(k, CONTRACTED, FACTOR)
        mask = _and(b < B, in_source & (f < F), k < K, BATCHED)
        x = _load(
            source, source_token, source_feature, source_t, source_b, source_f, source_k, mask, SOURCE_LIMIT, BATCHED
        )
        if gates is not None:
            x = _scale(x, gate, BATCHED)
        mask = _and(b < B, k < K, n < N, BATCHED)
        w = tl.load(factor + _sum(factor_b, factor_k, factor_n, BATCHED), mask, 0.0)
        total += _dot(x, w, PRECISION)

    result_b, result_f, result_n = _offsets(b, BATCH, RESULT), _offsets(f, FREE, RESULT), _offsets(n, NEW, RESULT)
    mask = _and(b < B, in_result & (f < F), n < N, BATCHED)
    _store(
        result, bias, residual, result_token, result_feature, result_t, result_b, result_f, result_n,
        mask, total, RESULT_LIMIT, BATCHED,
    )  # fmt: skip


@triton.jit
def backward_step(
    grad, factor, source, residual, grad_source, grad_factor,
    grad_rows, source_rows, gates, grad_source_rows, starts,
    grad_token, grad_feature, grad_tokens,
    source_token, source_feature, source_tokens,
    grad_source_token, grad_source_feature, grad_source_tokens, params, bucket,
    BATCH: tl.constexpr, FREE: tl.constexpr, NEW: tl.constexpr, CONTRACTED: tl.constexpr,
    B: tl.constexpr, F: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    SOURCE_LIMIT: tl.constexpr, RESULT_LIMIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_factor[split, b, n, k] = sum_(t f) grad[b, t f, n] gate_t source[b, t f, k], over a split of the tokens.

    A split is a SHARE of tokens x free or, with a routing, all slots of one expert.

    If grad_source is wanted too, a tile holds all of n and k, and each entry of grad is read only once:
    grad_source[b, t f, k] = sum_n grad[b, t f, n] factor[b, n, k] (+ residual, with the layout of grad_source)
    """
    BATCHED: tl.constexpr = BLOCK_B > 1
    N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    B_BLOCKS: tl.constexpr = (B + BLOCK_B - 1) // BLOCK_B
    F_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    program = tl.program_id(0)
    n = program % N_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    k = program // N_BLOCKS % K_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    program = program // (N_BLOCKS * K_BLOCKS)
    b = _batch(program % B_BLOCKS, BLOCK_B)
    split = program // B_BLOCKS

    grad_b, source_b = _offsets(b, BATCH, RESULT), _offsets(b, BATCH, SOURCE)
    grad_n, source_k = _offsets(n, NEW, RESULT), _offsets(k, CONTRACTED, SOURCE)
    factor_b, factor_n, factor_k = _offsets(b, BATCH, FACTOR), _offsets(n, NEW, FACTOR), _offsets(k, CONTRACTED, FACTOR)
    factor_offsets = _sum(factor_b, factor_n, factor_k, BATCHED)
    factor_mask = _and(b < B, n < N, k < K, BATCHED)
    if starts is not None:
        factor += tl.cast(split, tl.int64) * params
        first = tl.load(starts + split) * (BLOCK_SLOTS // BLOCK_T * F_BLOCKS)
        blocks = tl.load(starts + split + 1) * (BLOCK_SLOTS // BLOCK_T * F_BLOCKS) - first
    else:
        blocks = SHARE // (BLOCK_T * BLOCK_F)
        first = split * blocks
    if grad_source is not None:
        w = tl.load(factor + factor_offsets, factor_mask, 0.0)
    total = _zeros(BLOCK_B, BLOCK_N, BLOCK_K)
    m = tl.arange(0, BLOCK_T * BLOCK_F)
    for i in range(0, blocks):
        block = first + i
        f = block % F_BLOCKS * BLOCK_F + m % BLOCK_F
        t = block // F_BLOCKS * BLOCK_T + m // BLOCK_F
        grad_f, source_f = _offsets(f, FREE, RESULT), _offsets(f, FREE, SOURCE)
        grad_t, in_grad = _rows(grad_rows, t, grad_tokens)
        source_t, in_source = _rows(source_rows, t, source_tokens)
        mask = _and(b < B, in_grad & (f < F), n < N, BATCHED)
        g = _load(grad, grad_token, grad_feature, grad_t, grad_b, grad_f, grad_n, mask, RESULT_LIMIT, BATCHED)
        mask = _and(b < B, in_source & (f < F), k < K, BATCHED)
        x = _load(
            source, source_token, source_feature, source_t, source_b, source_f, source_k, mask, SOURCE_LIMIT, BATCHED
        )
        if gates is not None:
            x = _scale(x, tl.load(gates + t), BATCHED)
        total += _dot(_transpose(g, BATCHED), x, PRECISION)
        if grad_source is not None:
            product = _dot(g, w, PRECISION)
            grad_source_t, in_grad_source = _rows(grad_source_rows, t, grad_source_tokens)
            mask = _and(b < B, in_grad_source & (f < F), k < K, BATCHED)
            _store(
                grad_source, None, residual, grad_source_token, grad_source_feature,
                grad_source_t, source_b, source_f, source_k, mask, product, SOURCE_LIMIT, BATCHED,
            )  # fmt: skip
    grad_factor += tl.cast(split, tl.int64) * params
    tl.store(grad_factor + factor_offsets, total.to(grad_factor.dtype.element_ty), factor_mask)


@triton.jit
def _offsets(index, GROUP: tl.constexpr, TENSOR: tl.constexpr):
    """The offsets of the entries of a group in a tensor, by flat index."""
    total = index * 0
    for i in tl.static_range(len(GROUP) - 1, 0, -1):
        total += index % GROUP[i][0] * GROUP[i][TENSOR]
        index = index // GROUP[i][0]
    return total + index * GROUP[0][TENSOR]


@triton.jit
def _batch(block, BLOCK: tl.constexpr):
    """The indices of a block of the batch: a number if the block has one entry."""
    if BLOCK > 1:
        return block * BLOCK + tl.arange(0, BLOCK)
    else:
        return block


@triton.jit
def _rows(rows, t, tokens):
    """The rows of the tokens of a tile in a tensor, and whether they exist."""
    if rows is not None:
        row = tl.load(rows + t)
        return row, row >= 0
    else:
        return t, t < tokens


@triton.jit
def _sum(b, m, n, BATCHED: tl.constexpr):
    """The offsets of a tile from those along its dimensions. b is a number if there is no batch dimension."""
    if BATCHED:
        return b[:, None, None] + m[None, :, None] + n[None, None, :]
    else:
        return b + m[:, None] + n[None, :]


@triton.jit
def _and(b, m, n, BATCHED: tl.constexpr):
    """The mask of a tile from those along its dimensions.

    Without a batch dimension b is always true, since `_batch` gives each program one entry that exists. It is left out,
    also because triton 3.9's interpreter refuses masks that a number has gone into.
    """
    if BATCHED:
        return b[:, None, None] & m[None, :, None] & n[None, None, :]
    else:
        return m[:, None] & n[None, :]


@triton.jit
def _zeros(B: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    if B > 1:
        return tl.full((B, M, N), 0.0, tl.float32)
    else:
        return tl.full((M, N), 0.0, tl.float32)


@triton.jit
def _transpose(tile, BATCHED: tl.constexpr):
    if BATCHED:
        return tl.permute(tile, (0, 2, 1))
    else:
        return tl.permute(tile, (1, 0))


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    # The interpreter's products know no bfloat16.
    if PRECISION == "widen":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _scale(tile, gate, BATCHED: tl.constexpr):
    """A tile whose rows are multiplied by their gates."""
    if BATCHED:
        return (tile.to(tl.float32) * gate[None, :, None]).to(tile.dtype)
    else:
        return (tile.to(tl.float32) * gate[:, None]).to(tile.dtype)


@triton.jit
def _pointers(tensor, token, feature, t, b, m, n, BATCHED: tl.constexpr):
    """Pointers to a tile, in 64 bits. t: the tokens of its rows; b, m, n: features along its dimensions."""
    b, m, n = tl.cast(b, tl.int64) * feature, m.to(tl.int64) * feature, n.to(tl.int64) * feature
    return tensor + _sum(b, t.to(tl.int64) * token + m, n, BATCHED)


@triton.jit
def _without_padding(mask, b, m, n, LIMIT: tl.constexpr, BATCHED: tl.constexpr):
    """The mask without the features that are padding."""
    if LIMIT > 0:
        return mask & (_sum(b, m, n, BATCHED) < LIMIT)
    else:
        return mask


@triton.jit
def _load(tensor, token, feature, t, b, m, n, mask, LIMIT: tl.constexpr, BATCHED: tl.constexpr):
    """A tile of a tensor, zero where it is masked or padding."""
    mask = _without_padding(mask, b, m, n, LIMIT, BATCHED)
    return tl.load(_pointers(tensor, token, feature, t, b, m, n, BATCHED), mask, 0.0)


@triton.jit
def _store(
    tensor, bias, residual, token, feature, t, b, m, n, mask, tile, LIMIT: tl.constexpr, BATCHED: tl.constexpr
):  # fmt: skip
    """Write a tile plus the bias, if any, and the residual, if any, which has the layout of the tensor."""
    mask = _without_padding(mask, b, m, n, LIMIT, BATCHED)
    if bias is not None:
        tile += tl.load(bias + _sum(b, m, n, BATCHED), mask, 0.0).to(tl.float32)
    if residual is not None:
        tile += tl.load(_pointers(residual, token, feature, t, b, m, n, BATCHED), mask, 0.0).to(tl.float32)
    tl.store(_pointers(tensor, token, feature, t, b, m, n, BATCHED), tile.to(tensor.dtype.element_ty), mask)
