// A thread's share of a step on a tile: its factor packed, its products, the token-major memory at the ends.
#pragma once

#include <algorithm>

#include "multiply.h"
#include "program.h"
#include "team.h"
#include "transpose.h"

namespace {

template <class S>
struct Weights {  // a factor as its step multiplies with it
    const S* data;
    const Index* batch;  // offsets, or null where it is `size` times the batch
    Index size, wk, wm;  // strides of inner and row; zero if packed
    const S* at(Index b) const { return data + (batch ? batch[b] : b * size); }
};

// How many of the rows left the next micro-kernel takes.
static constexpr Index micro_rows(Index left) {
    Index m = MICRO_ROWS;
    while (m > left) m = m > 4 ? m - 4 : m - 1;
    return m;
}

// (rows, inner) -> for every group of rows that a micro-kernel takes, contiguous (inner, rows of the group)
template <class S>
static void pack_matrix(const S* from, const Index* row_at, const Index* inner_at, Index rows, Index inner, S* to) {
    constexpr Index L = Simd<S>::lanes;
    bool plain = true;
    for (Index k = 0; k < inner; k++) plain &= inner_at[k] == k;
    for (Index m = 0; m < rows;) {
        Index group = micro_rows(rows - m), k = 0;
        // A whole vector is stored; what is too much of it is overwritten by the next one.
        for (; plain && group <= L && (k + L - 1) * group + L <= inner * group; k += L) {
            Vec<S> r[L];
#pragma GCC unroll 16
            for (int l = 0; l < L; l++) r[l] = l < group ? load(from + row_at[m + l] + k) : Vec<S>{};
            stage<S, 1>(r);
#pragma GCC unroll 16
            for (int l = 0; l < L; l++) store(to + (k + l) * group, r[l]);
        }
        for (; k < inner; k++)
            for (Index i = 0; i < group; i++) to[k * group + i] = from[row_at[m + i] + inner_at[k]];
        to += group * inner, m += group;
    }
}

template <class S>
static void pack(const Step& s, const S* factor, S* to, bool backward, Share mine) {
    for (Index b = mine.first(s.batches); b < mine.last(s.batches); b++) {
        const S* from = factor + s.w_b[b];
        if (backward)
            pack_matrix(from, s.w_k, s.w_r, s.inner, s.rows, to + b * s.rows * s.inner);
        else
            pack_matrix(from, s.w_r, s.w_k, s.rows, s.inner, to + b * s.rows * s.inner);
    }
}

// Token-major memory behind a tile: `tokens` rows of `features`, one after the other or, if `rows` is given, there.
// Rows given so are scaled when they are read, and added to when they are written.
template <class S, class Pointer>
struct Tokens {
    Pointer data;
    Index features, tokens;
    const Pointer* rows = nullptr;
    const S* scales = nullptr;
};
template <class S>
using Source = Tokens<S, const S*>;
template <class S>
using Sink = Tokens<S, S*>;

// features [first, first + count) of token-major memory -> rows of a tile; absent tokens and features are zero
template <class S>
static void read_rows(Source<S> from, Index first, Index count, S* to, Index tile) {
    Index present = std::max<Index>(0, std::min(count, from.features - first));
    if (from.rows)
        gather(from.rows, from.scales, from.tokens, first, present, to, tile);
    else {
        if (from.tokens < tile) std::fill_n(to, present * tile, S(0));  // arithmetic on leftovers may be slow
        transpose(from.data + first, from.features, to, tile, from.tokens, present);
    }
    std::fill_n(to + present * tile, (count - present) * tile, S(0));
}
template <class S>
static void write_rows(const S* from, Index tile, Sink<S> to, Index first, Index count, const S* bias) {
    count = std::min(count, to.features - first);
    if (count <= 0) return;
    if (to.rows) return scatter_add(from, tile, to.rows, to.tokens, first, count);
    transpose(from, tile, to.data + first, to.features, count, to.tokens);
    if (bias)
        for (Index t = 0; t < to.tokens; t++)
            for (Index j = first; j < first + count; j++) to.data[t * to.features + j] += bias[j];
}
template <class S>
static void read_tile(Source<S> from, S* to, Index width, Index tile, Share mine) {
    constexpr Index block = 4 * Simd<S>::lanes;
    Index blocks = (width + block - 1) / block;
    for (Index i = mine.first(blocks) * block; i < std::min(width, mine.last(blocks) * block); i += block)
        read_rows(from, i, std::min(block, width - i), to + i * tile, tile);
}
template <class S>
static void write_tile(const S* from, Index tile, Sink<S> to, const S* bias, Share mine) {
    constexpr Index block = 4 * Simd<S>::lanes;
    Index blocks = (to.features + block - 1) / block;
    for (Index i = mine.first(blocks) * block; i < std::min(to.features, mine.last(blocks) * block); i += block)
        write_rows(from + i * tile, tile, to, i, std::min(block, to.features - i), bias);
}

// One direction of a step: where its products read and write.
struct Side {
    const Index *batch, *column, *row;
    Index rows, stride;
    bool run() const { return stride == 1; }  // whether a product's rows are neighbours
};
static Side before(const Step& s) {
    return {s.in_b, s.in_c, s.in_k, s.inner, s.in_stride};
}
static Side after(const Step& s) {
    return {s.out_b, s.out_c, s.out_r, s.rows, s.out_stride};
}

// All products of a step. Where rows are neighbours the first step can read token-major memory and the last one write
// it, a product at a time, through `scratch`: then these states need no room in cache.
template <class S>
static void run_step(const Step& s, const Weights<S>& w, Side in, Side out, const S* from, S* to,
                     const Source<S>* source, const Sink<S>* sink, const S* bias, S* scratch, Index tile, bool add,
                     Share mine) {
    for (Index p = mine.first(s.pairs()); p < mine.last(s.pairs()); p++) {
        Index b = p / s.columns, c = p % s.columns;
        Index in_at = in.batch[b] + in.column[c], out_at = out.batch[b] + out.column[c];
        const S* rows_in = from + in_at * tile;
        S* rows_out = to + out_at * tile;
        if (source) {
            read_rows(*source, in_at, in.rows, scratch, tile);
            rows_in = scratch;
        }
        if (sink) rows_out = scratch + in.rows * tile;
        multiply(w.at(b), w.wk, w.wm, rows_in, in.row, in.rows, rows_out, out.row, out.rows, tile, add);
        if (sink) write_rows(rows_out, tile, *sink, out_at, out.rows, bias);
    }
}

}  // namespace
