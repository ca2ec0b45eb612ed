# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The kernels: one contraction step, and the gradient of its factor.

The source is (b, t f, k), the factor (b, k, n) and the result (b, t f, n), with b, f, n, k the flat indices of the
batch, free, new and contracted axes, and t that of the tokens. A tile is (b, tokens x free, n or k). Groups of axes
(`launch.Group`) are constants, so a kernel sees neighbours in memory. With a routing, tokens are slots, factors stacks.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

# positions of the strides in a group
# `bucket` is no operand but the key by which the autotuner remembers its choice
FACTOR, SOURCE, RESULT = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def forward_step(
    source, factor, bias, addend, multiplier, result, experts, tokens,
    source_token, source_feature, result_token, result_feature, bucket,
    BATCH: tl.constexpr, FREE: tl.constexpr, NEW: tl.constexpr, CONTRACTED: tl.constexpr,
    B: tl.constexpr, F: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    SOURCE_LIMIT: tl.constexpr, RESULT_LIMIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """result[b, t f, n] = activation(sum_k source[b, t f, k] factor[b, k, n] (+ bias) (+ addend)) (* multiplier)

    The addend and the multiplier lie in memory as the result does.
    """
    # The tokens are slowest, so that programs that run together read the same tokens.
    n, program = _entries(tl.program_id(0), N, BLOCK_N)
    b, program = _entries(program, B, BLOCK_B)
    t, f = _rows(program, F, BLOCK_T, BLOCK_F)
    if experts is not None:
        expert = tl.load(experts + program // ((F + BLOCK_F - 1) // BLOCK_F) * BLOCK_T // BLOCK_SLOTS)
        factor += expert.to(tl.int64) * (B * N * K)

    rows = (t < tokens) & (f < F)
    source_b, source_f, factor_b = _offsets(b, BATCH, SOURCE), _offsets(f, FREE, SOURCE), _offsets(b, BATCH, FACTOR)
    factor_n = _offsets(n, NEW, FACTOR)
    total = tl.full((BLOCK_B, BLOCK_T * BLOCK_F, BLOCK_N), 0.0, tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        features = _sum(source_b, source_f, _offsets(k, CONTRACTED, SOURCE))
        mask = _mask(b < B, rows, k < K, features, SOURCE_LIMIT)
        x = tl.load(_pointers(source, source_token, source_feature, t, features), mask, 0.0)
        weights = _sum(factor_b, _offsets(k, CONTRACTED, FACTOR), factor_n)
        w = tl.load(factor + weights, _mask(b < B, k < K, n < N, weights, 0), 0.0)
        total += _dot(x, w, PRECISION)

    features = _sum(_offsets(b, BATCH, RESULT), _offsets(f, FREE, RESULT), _offsets(n, NEW, RESULT))
    mask = _mask(b < B, rows, n < N, features, RESULT_LIMIT)
    if bias is not None:
        total += tl.load(bias + features, mask, 0.0).to(tl.float32)
    if addend is not None:
        total += tl.load(_pointers(addend, result_token, result_feature, t, features), mask, 0.0).to(tl.float32)
    total = _activate(total, ACTIVATION)
    if multiplier is not None:
        total *= tl.load(_pointers(multiplier, result_token, result_feature, t, features), mask, 0.0).to(tl.float32)
    tl.store(_pointers(result, result_token, result_feature, t, features), total.to(result.dtype.element_ty), mask)


@triton.jit
def factor_gradient(
    grad, source, grad_factor, starts, tokens,
    grad_token, grad_feature, source_token, source_feature, bucket,
    BATCH: tl.constexpr, FREE: tl.constexpr, NEW: tl.constexpr, CONTRACTED: tl.constexpr,
    B: tl.constexpr, F: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    SOURCE_LIMIT: tl.constexpr, RESULT_LIMIT: tl.constexpr, PRECISION: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_factor[split, b, n, k] = sum_(t f) grad[b, t f, n] source[b, t f, k]

    The tokens of a split are a SHARE of all or, with a routing, the slots of one expert.
    """
    n, program = _entries(tl.program_id(0), N, BLOCK_N)
    k, program = _entries(program, K, BLOCK_K)
    b, split = _entries(program, B, BLOCK_B)
    if starts is not None:
        first, last = tl.load(starts + split), tl.load(starts + split + 1)
    else:
        first = split * SHARE
        last = tl.minimum(first + SHARE, tokens)

    grad_b, source_b = _offsets(b, BATCH, RESULT), _offsets(b, BATCH, SOURCE)
    grad_n, source_k = _offsets(n, NEW, RESULT), _offsets(k, CONTRACTED, SOURCE)
    F_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    total = tl.full((BLOCK_B, BLOCK_N, BLOCK_K), 0.0, tl.float32)
    for block in range(first // BLOCK_T * F_BLOCKS, tl.cdiv(last, BLOCK_T) * F_BLOCKS):
        t, f = _rows(block, F, BLOCK_T, BLOCK_F)
        rows = (t < tokens) & (f < F)
        features = _sum(grad_b, _offsets(f, FREE, RESULT), grad_n)
        mask = _mask(b < B, rows, n < N, features, RESULT_LIMIT)
        g = tl.load(_pointers(grad, grad_token, grad_feature, t, features), mask, 0.0)
        features = _sum(source_b, _offsets(f, FREE, SOURCE), source_k)
        mask = _mask(b < B, rows, k < K, features, SOURCE_LIMIT)
        x = tl.load(_pointers(source, source_token, source_feature, t, features), mask, 0.0)
        total += _dot(tl.permute(g, (0, 2, 1)), x, PRECISION)

    grad_factor += tl.cast(split, tl.int64) * (B * N * K)
    weights = _sum(_offsets(b, BATCH, FACTOR), _offsets(n, NEW, FACTOR), _offsets(k, CONTRACTED, FACTOR))
    mask = _mask(b < B, n < N, k < K, weights, 0)
    tl.store(grad_factor + weights, total.to(grad_factor.dtype.element_ty), mask)


@triton.jit
def _entries(program, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The indices of a block of a group, and the number of the program among those with the same block."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    return program % BLOCKS * BLOCK + tl.arange(0, BLOCK), program // BLOCKS


@triton.jit
def _rows(block, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """The tokens and the free indices of the rows of a tile."""
    F_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    m = tl.arange(0, BLOCK_T * BLOCK_F)
    return block // F_BLOCKS * BLOCK_T + m // BLOCK_F, block % F_BLOCKS * BLOCK_F + m % BLOCK_F


@triton.jit
def _offsets(index, GROUP: tl.constexpr, TENSOR: tl.constexpr):
    """The offsets of the entries of a group in a tensor, by flat index."""
    total = index * 0
    for i in tl.static_range(len(GROUP) - 1, 0, -1):
        total += index % GROUP[i][0] * GROUP[i][TENSOR]
        index = index // GROUP[i][0]
    return total + index * GROUP[0][TENSOR]


@triton.jit
def _sum(b, m, n):
    return b[:, None, None] + m[None, :, None] + n[None, None, :]


@triton.jit
def _mask(b, m, n, features, LIMIT: tl.constexpr):
    """The entries of a tile that exist; with a LIMIT, those from this feature on are padding."""
    mask = b[:, None, None] & m[None, :, None] & n[None, None, :]
    if LIMIT > 0:
        mask = mask & (features < LIMIT)
    return mask


@triton.jit
def _pointers(tensor, token, feature, t, features):
    """Pointers to a tile, in 64 bits."""
    return tensor + t.to(tl.int64)[None, :, None] * token + features.to(tl.int64) * feature


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activations of `ops.ACTIVATIONS`, in float32."""
    if ACTIVATION == "relu":
        # not a maximum, which may lose NaN
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu_squared":
        x = tl.where(x < 0, 0.0, x * x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        # the difference loses digits of small numbers, which have a short series
        square = x * x
        series = x * (1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
        x = tl.where(square < 0.0156, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)
    else:
        tl.static_assert(ACTIVATION == "identity")
    return x


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if PRECISION == "widen":
        # The interpreter's products know no bfloat16.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.shape[0] == 1:
        # Hopper's matrix units take tiles of two dimensions only.
        a, b = tl.reshape(a, (a.shape[1], a.shape[2])), tl.reshape(b, (b.shape[1], b.shape[2]))
        return tl.expand_dims(tl.dot(a, b, input_precision=PRECISION), 0)
    else:
        return tl.dot(a, b, input_precision=PRECISION)
