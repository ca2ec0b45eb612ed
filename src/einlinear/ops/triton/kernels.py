# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The kernels: one step forward, one step backward, and two steps forward at once.

A state is a pointer, the strides of its tokens and of its features, and how many of its tokens exist. A group of axes
is a tuple of (size, strides...), see `steps.py`. B, C, R, K count the entries of batch, columns, rows and inner.

With experts, tokens are slots (`slots.py`): blocks of UNIT of them have an expert each, whose weights are read, and
`*_rows` say where the tokens of slots lie in a state, if not in their order.

A tile has tokens x columns as its rows, and a batch dimension in front where BLOCK_B > 1. Threads are laid along what
lies next to each other in memory, which the compiler sees from the strides: they are constants, or known to be 1.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

FACTOR, SOURCE, RESULT = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # strides in the groups of a step
FIRST, SECOND, BEFORE, MIDDLE, AFTER = (tl.constexpr(i) for i in range(1, 6))  # strides in the roles of two


@triton.jit
def _features(index, GROUP: tl.constexpr, TENSOR: tl.constexpr):
    """Where the entries of a group lie in a tensor, by flat index."""
    total = index * 0
    for i in tl.static_range(len(GROUP) - 1, 0, -1):
        total += index % GROUP[i][0] * GROUP[i][TENSOR]
        index = index // GROUP[i][0]
    return total + index * GROUP[0][TENSOR]


@triton.jit
def _sum(b, m, n, BATCHED: tl.constexpr):
    """Offsets of a tile from those along its dimensions; b is a number where there is no batch dimension."""
    if BATCHED:
        return b[:, None, None] + m[None, :, None] + n[None, None, :]
    else:
        return b + m[:, None] + n[None, :]


@triton.jit
def _all(b, m, n, BATCHED: tl.constexpr):
    """The mask of a tile from those along its dimensions.

    Without a batch dimension b is a number that always holds: `_batch` gives each program a single one that exists. It
    is left out, also because triton 3.9's interpreter refuses masks that a number has gone into.
    """
    if BATCHED:
        return b[:, None, None] & m[None, :, None] & n[None, None, :]
    else:
        return m[:, None] & n[None, :]


@triton.jit
def _batch(block, BLOCK: tl.constexpr):
    """The indices of a block of the batch: a number where it is a single one."""
    if BLOCK > 1:
        return block * BLOCK + tl.arange(0, BLOCK)
    else:
        return block


@triton.jit
def _zeros(B: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    if B > 1:
        return tl.full((B, M, N), 0.0, tl.float32)
    else:
        return tl.full((M, N), 0.0, tl.float32)


@triton.jit
def _swap(tile, BATCHED: tl.constexpr):
    if BATCHED:
        return tl.permute(tile, (0, 2, 1))
    else:
        return tl.permute(tile, (1, 0))


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if PRECISION == "widen":  # the interpreter's products know no bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _places(state, token, feature, t, b, m, n, BATCHED: tl.constexpr):
    """Pointers to a tile of a state, in 64 bits. t: the tokens of its rows; b, m, n: features along its dimensions."""
    b, m, n = tl.cast(b, tl.int64) * feature, m.to(tl.int64) * feature, n.to(tl.int64) * feature
    return state + _sum(b, t.to(tl.int64) * token + m, n, BATCHED)


@triton.jit
def _find(rows, t, tokens):
    """Where the tokens of a tile lie in a state, and which of them exist."""
    if rows is not None:
        row = tl.load(rows + t)
        return row, row >= 0
    else:
        return t, t < tokens


@triton.jit
def _scale(tile, gate, BATCHED: tl.constexpr):
    """A tile whose rows are multiplied by their gates."""
    if BATCHED:
        return (tile.to(tl.float32) * gate[None, :, None]).to(tile.dtype)
    else:
        return (tile.to(tl.float32) * gate[:, None]).to(tile.dtype)


@triton.jit
def _exist(mask, b, m, n, LIMIT: tl.constexpr, BATCHED: tl.constexpr):
    """The mask without the features that are padding."""
    if LIMIT > 0:
        return mask & (_sum(b, m, n, BATCHED) < LIMIT)
    else:
        return mask


@triton.jit
def _load(state, token, feature, t, b, m, n, mask, LIMIT: tl.constexpr, BATCHED: tl.constexpr):
    """A tile of a state, zero where the mask says so and where there is padding."""
    return tl.load(_places(state, token, feature, t, b, m, n, BATCHED), _exist(mask, b, m, n, LIMIT, BATCHED), 0.0)


@triton.jit
def _store(
    state, bias, residual, token, feature, t, b, m, n, mask, tile, LIMIT: tl.constexpr, BATCHED: tl.constexpr
):  # fmt: skip
    """Write a tile plus the bias, if any, and the residual, if any, which lies like the state."""
    mask = _exist(mask, b, m, n, LIMIT, BATCHED)
    if bias is not None:
        tile += tl.load(bias + _sum(b, m, n, BATCHED), mask, 0.0).to(tl.float32)
    if residual is not None:
        tile += tl.load(_places(residual, token, feature, t, b, m, n, BATCHED), mask, 0.0).to(tl.float32)
    tl.store(_places(state, token, feature, t, b, m, n, BATCHED), tile.to(state.dtype.element_ty), mask)


@triton.jit
def forward_step(
    x, w, bias, residual, y,
    x_rows, x_gates, y_rows, experts,
    x_token, x_feature, x_tokens,
    y_token, y_feature, y_tokens, w_size, bucket,
    BATCH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    X_LIMIT: tl.constexpr, Y_LIMIT: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[b, t c, r] = sum_k x[b, t c, k] w[b, k, r] (+ bias) (+ residual, which lies like y)."""
    BATCHED: tl.constexpr = BLOCK_B > 1
    R_BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    B_BLOCKS: tl.constexpr = (B + BLOCK_B - 1) // BLOCK_B
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)  # the tokens slowest: programs that run together read the same tokens
    b = _batch(program // R_BLOCKS % B_BLOCKS, BLOCK_B)
    r = program % R_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    program = program // (R_BLOCKS * B_BLOCKS)
    m = tl.arange(0, BLOCK_T * BLOCK_C)
    c = program % C_BLOCKS * BLOCK_C + m % BLOCK_C
    t = program // C_BLOCKS * BLOCK_T + m // BLOCK_C
    if experts is not None:
        expert = tl.load(experts + program // C_BLOCKS * BLOCK_T // UNIT)
        if expert < 0:
            return
        w += expert.to(tl.int64) * w_size
    x_t, x_there = _find(x_rows, t, x_tokens)
    y_t, y_there = _find(y_rows, t, y_tokens)
    if x_gates is not None:
        gate = tl.load(x_gates + t)

    x_b, x_c, w_b = _features(b, BATCH, SOURCE), _features(c, COLUMNS, SOURCE), _features(b, BATCH, FACTOR)
    w_r = _features(r, ROWS, FACTOR)
    total = _zeros(BLOCK_B, BLOCK_T * BLOCK_C, BLOCK_R)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_k, w_k = _features(k, INNER, SOURCE), _features(k, INNER, FACTOR)
        inside = _all(b < B, x_there & (c < C), k < K, BATCHED)
        x_tile = _load(x, x_token, x_feature, x_t, x_b, x_c, x_k, inside, X_LIMIT, BATCHED)
        if x_gates is not None:
            x_tile = _scale(x_tile, gate, BATCHED)
        w_tile = tl.load(w + _sum(w_b, w_k, w_r, BATCHED), _all(b < B, k < K, r < R, BATCHED), 0.0)
        total += _dot(x_tile, w_tile, PRECISION)

    y_b, y_c, y_r = _features(b, BATCH, RESULT), _features(c, COLUMNS, RESULT), _features(r, ROWS, RESULT)
    inside = _all(b < B, y_there & (c < C), r < R, BATCHED)
    _store(y, bias, residual, y_token, y_feature, y_t, y_b, y_c, y_r, inside, total, Y_LIMIT, BATCHED)


@triton.jit
def backward_step(
    grad, w, x, residual, grad_x, grad_w,
    g_rows, x_rows, x_gates, d_rows, starts,
    g_token, g_feature, g_tokens,
    x_token, x_feature, x_tokens,
    d_token, d_feature, d_tokens, w_size, bucket,
    BATCH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    X_LIMIT: tl.constexpr, Y_LIMIT: tl.constexpr, PRECISION: tl.constexpr, SHARE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_w[split, b, r, k] = sum_(t c) grad[b, t c, r] x[b, t c, k] over a split's SHARE of tokens x columns.

    With experts, a split has all slots of one of them.

    Where grad_x is wanted too, a block holds all rows and inner, and each gradient of the result is read only once:
    grad_x[b, t c, k] = sum_r grad[b, t c, r] w[b, r, k] (+ residual, which lies like grad_x).
    """
    BATCHED: tl.constexpr = BLOCK_B > 1
    R_BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    B_BLOCKS: tl.constexpr = (B + BLOCK_B - 1) // BLOCK_B
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    r = program % R_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    k = program // R_BLOCKS % K_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    program = program // (R_BLOCKS * K_BLOCKS)
    b = _batch(program % B_BLOCKS, BLOCK_B)
    split = program // B_BLOCKS

    g_b, x_b = _features(b, BATCH, RESULT), _features(b, BATCH, SOURCE)
    g_r, x_k = _features(r, ROWS, RESULT), _features(k, INNER, SOURCE)
    w_places = _sum(_features(b, BATCH, FACTOR), _features(r, ROWS, FACTOR), _features(k, INNER, FACTOR), BATCHED)
    w_inside = _all(b < B, r < R, k < K, BATCHED)
    if starts is not None:
        w += tl.cast(split, tl.int64) * w_size
        first = tl.load(starts + split) * (UNIT // BLOCK_T * C_BLOCKS)
        turns = tl.load(starts + split + 1) * (UNIT // BLOCK_T * C_BLOCKS) - first
    else:
        turns = SHARE // (BLOCK_T * BLOCK_C)
        first = split * turns
    if grad_x is not None:
        w_tile = tl.load(w + w_places, w_inside, 0.0)
    total = _zeros(BLOCK_B, BLOCK_R, BLOCK_K)
    m = tl.arange(0, BLOCK_T * BLOCK_C)
    for i in range(0, turns):
        block = first + i
        c = block % C_BLOCKS * BLOCK_C + m % BLOCK_C
        t = block // C_BLOCKS * BLOCK_T + m // BLOCK_C
        g_c, x_c = _features(c, COLUMNS, RESULT), _features(c, COLUMNS, SOURCE)
        g_t, g_there = _find(g_rows, t, g_tokens)
        x_t, x_there = _find(x_rows, t, x_tokens)
        inside = _all(b < B, g_there & (c < C), r < R, BATCHED)
        g_tile = _load(grad, g_token, g_feature, g_t, g_b, g_c, g_r, inside, Y_LIMIT, BATCHED)
        inside = _all(b < B, x_there & (c < C), k < K, BATCHED)
        x_tile = _load(x, x_token, x_feature, x_t, x_b, x_c, x_k, inside, X_LIMIT, BATCHED)
        if x_gates is not None:
            x_tile = _scale(x_tile, tl.load(x_gates + t), BATCHED)
        total += _dot(_swap(g_tile, BATCHED), x_tile, PRECISION)
        if grad_x is not None:
            d_tile = _dot(g_tile, w_tile, PRECISION)
            d_t, d_there = _find(d_rows, t, d_tokens)
            inside = _all(b < B, d_there & (c < C), k < K, BATCHED)
            _store(grad_x, None, residual, d_token, d_feature, d_t, x_b, x_c, x_k, inside, d_tile, X_LIMIT, BATCHED)
    grad_w += tl.cast(split, tl.int64) * w_size
    tl.store(grad_w + w_places, total.to(grad_w.dtype.element_ty), w_inside)


@triton.jit
def forward_fused(
    x, first, second, bias, residual, middle, y,
    x_token, x_feature, x_tokens,
    z_token, z_feature, z_tokens,
    y_token, y_feature, y_tokens, bucket,
    OUTER: tl.constexpr, A: tl.constexpr, B: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, R: tl.constexpr,
    N_OUTER: tl.constexpr, N_A: tl.constexpr, N_B: tl.constexpr, N_G: tl.constexpr,
    N_D: tl.constexpr, N_E: tl.constexpr, N_F: tl.constexpr, N_R: tl.constexpr,
    X_LIMIT: tl.constexpr, Y_LIMIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_A: tl.constexpr, ALL_B: tl.constexpr, ALL_G: tl.constexpr, ALL_R: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """z[g, t b, r f d] = sum_a x[g, t b, a] first[g, a, r f d], then y[f, t d, e] = sum_(g b r) z second[f, g b r, e].

    A program owns a few tokens and some of f and d, and all of g, b and r, so that z never leaves the chip; where the
    backward pass wants it, middle keeps a copy.
    """
    HAS_G: tl.constexpr = ALL_G > 1
    HAS_F: tl.constexpr = BLOCK_F > 1
    D_BLOCKS: tl.constexpr = (N_D + BLOCK_D - 1) // BLOCK_D
    F_BLOCKS: tl.constexpr = (N_F + BLOCK_F - 1) // BLOCK_F
    program = tl.program_id(0)
    d_block, f_block = program % D_BLOCKS, program // D_BLOCKS % F_BLOCKS
    program = program // (D_BLOCKS * F_BLOCKS)
    outer, t_start = program % N_OUTER, program // N_OUTER * BLOCK_T

    # The first product: rows t b (b fastest), columns r f d.
    m, n = tl.arange(0, BLOCK_T * ALL_B), tl.arange(0, ALL_R * BLOCK_F * BLOCK_D)
    g = _batch(program * 0, ALL_G)
    t, b = t_start + m // ALL_B, m % ALL_B
    r, f, d = n // (BLOCK_F * BLOCK_D), f_block * BLOCK_F + n // BLOCK_D % BLOCK_F, d_block * BLOCK_D + n % BLOCK_D
    rows, columns = b < N_B, (r < N_R) & (f < N_F) & (d < N_D)
    x_g, x_b = _features(g, G, BEFORE), _features(outer, OUTER, BEFORE) + _features(b, B, BEFORE)
    w_g = _features(outer, OUTER, FIRST) + _features(g, G, FIRST)
    w_n = _features(r, R, FIRST) + _features(f, F, FIRST) + _features(d, D, FIRST)
    z = _zeros(ALL_G, BLOCK_T * ALL_B, ALL_R * BLOCK_F * BLOCK_D)
    for start in range(0, N_A, BLOCK_A):
        a = start + tl.arange(0, BLOCK_A)
        x_a = _features(a, A, BEFORE)
        inside = _all(g < N_G, rows & (t < x_tokens), a < N_A, HAS_G)
        x_tile = _load(x, x_token, x_feature, t, x_g, x_b, x_a, inside, X_LIMIT, HAS_G)
        w_places = _sum(w_g, _features(a, A, FIRST), w_n, HAS_G)
        w_tile = tl.load(first + w_places, _all(g < N_G, a < N_A, columns, HAS_G), 0.0)
        z += _dot(x_tile, w_tile, PRECISION)
    if middle is not None:
        z_g, z_b = _features(g, G, MIDDLE), _features(outer, OUTER, MIDDLE) + _features(b, B, MIDDLE)
        z_n = _features(r, R, MIDDLE) + _features(f, F, MIDDLE) + _features(d, D, MIDDLE)
        inside = _all(g < N_G, rows & (t < z_tokens), columns, HAS_G)
        _store(middle, None, None, z_token, z_feature, t, z_g, z_b, z_n, inside, z, 0, HAS_G)

    # The second: rows t d (d fastest), summed over g b r.
    z = tl.reshape(z.to(x.dtype.element_ty), (ALL_G, BLOCK_T, ALL_B, ALL_R, BLOCK_F, BLOCK_D))
    z = tl.permute(z, (4, 1, 5, 0, 2, 3))
    if HAS_F:
        z = tl.reshape(z, (BLOCK_F, BLOCK_T * BLOCK_D, ALL_G * ALL_B * ALL_R))
    else:
        z = tl.reshape(z, (BLOCK_T * BLOCK_D, ALL_G * ALL_B * ALL_R))
    m2, k = tl.arange(0, BLOCK_T * BLOCK_D), tl.arange(0, ALL_G * ALL_B * ALL_R)
    f2, d2, t2 = _batch(f_block, BLOCK_F), d_block * BLOCK_D + m2 % BLOCK_D, t_start + m2 // BLOCK_D
    g2, b2, r2 = k // (ALL_B * ALL_R), k // ALL_R % ALL_B, k % ALL_R
    rows2, inner = (t2 < y_tokens) & (d2 < N_D), (g2 < N_G) & (b2 < N_B) & (r2 < N_R)
    w_f = _features(outer, OUTER, SECOND) + _features(f2, F, SECOND)
    w_k = _features(g2, G, SECOND) + _features(b2, B, SECOND) + _features(r2, R, SECOND)
    y_f, y_d = _features(f2, F, AFTER), _features(outer, OUTER, AFTER) + _features(d2, D, AFTER)
    for start in range(0, N_E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        v_places = _sum(w_f, w_k, _features(e, E, SECOND), HAS_F)
        v_tile = tl.load(second + v_places, _all(f2 < N_F, inner, e < N_E, HAS_F), 0.0)
        total = _dot(z, v_tile, PRECISION)
        inside2 = _all(f2 < N_F, rows2, e < N_E, HAS_F)
        y_e = _features(e, E, AFTER)
        _store(y, bias, residual, y_token, y_feature, t2, y_f, y_d, y_e, inside2, total, Y_LIMIT, HAS_F)
