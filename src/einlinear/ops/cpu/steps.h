// A thread's share of a step on a tile: its factor packed, its products, the token-major memory at the ends.
#pragma once

#include <algorithm>

#include "multiply.h"
#include "program.h"
#include "team.h"
#include "transpose.h"

namespace {

// A factor as its step multiplies with it.
template <class S>
struct Weights {
    const S* data;
    // offsets, or null where they are `size` times the index
    const Index* batch;
    // strides of the contracted and the new axes; zero if packed
    Index size, wk, wm;
    const S* at(Index b) const { return data + (batch ? batch[b] : b * size); }
};

// How many of the rows left the next micro-kernel takes.
static constexpr Index micro_rows(Index left) {
    Index m = MICRO_ROWS;
    while (m > left) m = m > 4 ? m - 4 : m - 1;
    return m;
}

// (new, contracted) -> for every group of new features that a micro-kernel takes, contiguous (contracted, group)
template <class S>
static void pack_matrix(const S* from, const Index* row_at, const Index* k_at, Index rows, Index contracted, S* to) {
    constexpr Index L = Simd<S>::lanes;
    bool plain = true;
    for (Index k = 0; k < contracted; k++) plain &= k_at[k] == k;
    for (Index m = 0; m < rows;) {
        Index group = micro_rows(rows - m), k = 0;
        // A whole vector is stored; what is too much of it is overwritten by the next one.
        for (; plain && group <= L && (k + L - 1) * group + L <= contracted * group; k += L) {
            Vec<S> r[L];
#pragma GCC unroll 16
            for (int l = 0; l < L; l++) r[l] = l < group ? load(from + row_at[m + l] + k) : Vec<S>{};
            transpose_square<S>(r);
#pragma GCC unroll 16
            for (int l = 0; l < L; l++) store(to + (k + l) * group, r[l]);
        }
        for (; k < contracted; k++)
            for (Index i = 0; i < group; i++) to[k * group + i] = from[row_at[m + i] + k_at[k]];
        to += group * contracted, m += group;
    }
}

// Pack a factor for its step, or for the step back, in which new and contracted axes change places.
template <class S>
static void pack(const Step& s, const S* factor, S* to, bool backward, Share mine) {
    for (Index b = mine.first(s.batch_size); b < mine.last(s.batch_size); b++) {
        const S* from = factor + s.w_batch[b];
        S* matrix = to + b * s.new_size * s.contracted_size;
        if (backward)
            pack_matrix(from, s.w_contracted, s.w_new, s.contracted_size, s.new_size, matrix);
        else
            pack_matrix(from, s.w_new, s.w_contracted, s.new_size, s.contracted_size, matrix);
    }
}

// Token-major memory behind a tile: `tokens` rows of `features`, contiguous or, if `rows` is given, at these pointers.
// Rows at pointers are scaled when they are read, and added to when they are written.
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
        // arithmetic on leftovers may be slow
        if (from.tokens < tile) std::fill_n(to, present * tile, S(0));
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

// One side of a step, its input or its output: which rows a product reads or writes.
struct Side {
    const Index *batch, *free, *feature;
    Index features, stride;
    // whether the rows of a product are neighbours
    bool run() const { return stride == 1; }
};
static Side input_of(const Step& s) {
    return {s.in_batch, s.in_free, s.in_contracted, s.contracted_size, s.in_stride};
}
static Side output_of(const Step& s) {
    return {s.out_batch, s.out_free, s.out_new, s.new_size, s.out_stride};
}

// All products of a step. Where rows are neighbours the first step can read token-major memory and the last one write
// it, a product at a time, through `scratch`: then these ends need no room in cache.
template <class S>
static void run_step(const Step& s, const Weights<S>& w, Side in, Side out, const S* from, S* to,
                     const Source<S>* source, const Sink<S>* sink, const S* bias, S* scratch, Index tile, bool add,
                     Share mine) {
    for (Index p = mine.first(s.products()); p < mine.last(s.products()); p++) {
        Index b = p / s.free_size, c = p % s.free_size;
        Index in_at = in.batch[b] + in.free[c], out_at = out.batch[b] + out.free[c];
        const S* rows_in = from + in_at * tile;
        S* rows_out = to + out_at * tile;
        if (source) {
            read_rows(*source, in_at, in.features, scratch, tile);
            rows_in = scratch;
        }
        if (sink) rows_out = scratch + in.features * tile;
        multiply(w.at(b), w.wk, w.wm, rows_in, in.feature, in.features, rows_out, out.feature, out.features, tile, add);
        if (sink) write_rows(rows_out, tile, *sink, out_at, out.features, bias);
    }
}

}  // namespace
