// Packing: token-major memory into the rows of a tile and back, and factors into the order of the micro-kernels.
#pragma once

#include <algorithm>
#include <utility>

#include "program.h"
#include "team.h"

namespace {

template <class S, int Width, int Lane>
constexpr int interleaved(bool high) {
    constexpr int L = Simd<S>::lanes;
    // lane i of the low result: blocks of Width lanes, even ones of the first vector, then of the second
    return (Lane / Width) % 2 == 0 ? Lane + (high ? Width : 0) : Lane - Width + L + (high ? Width : 0);
}
template <class S, int Width, size_t... I>
static inline void exchange(Vec<S>& a, Vec<S>& b, std::index_sequence<I...>) {
    Vec<S> low = __builtin_shufflevector(a, b, interleaved<S, Width, (int)I>(false)...);
    Vec<S> high = __builtin_shufflevector(a, b, interleaved<S, Width, (int)I>(true)...);
    a = low, b = high;
}
// Transpose a square of vectors: log2(lanes) stages, each of which exchanges blocks twice as wide.
template <class S, int Width = 1>
static inline void transpose_square(Vec<S>* r) {
    constexpr int L = Simd<S>::lanes;
    if constexpr (Width < L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; i++)
            if (!(i & Width)) exchange<S, Width>(r[i], r[i + Width], std::make_index_sequence<L>());
        transpose_square<S, 2 * Width>(r);
    }
}

// (rows, cols) -> (cols, rows), square by square: `read` gives a vector of the row, `write` gets one of the column.
// What does not fill a square goes through `move`, entry by entry; `any_row` says that `read` and `write` take care of
// missing rows. The three capture by value: what they capture by reference is read again after every store.
template <class S, class Read, class Write, class Move>
__attribute__((always_inline)) static inline void transpose_squares(Index rows, Index cols, bool any_row, Read read,
                                                                    Write write, Move move) {
    constexpr int L = Simd<S>::lanes;
    for (Index i = 0; i < rows; i += L)
        for (Index j = 0; j < cols; j += L) {
            if ((any_row || i + L <= rows) && j + L <= cols) {
                Vec<S> r[L];
#pragma GCC unroll 16
                for (int l = 0; l < L; l++) r[l] = read(i, j, l);
                transpose_square<S>(r);
#pragma GCC unroll 16
                for (int l = 0; l < L; l++) write(i, j, l, r[l]);
            } else {
                const Index end = std::min(cols, j + L);
                for (Index a = i; a < std::min(rows, i + L); a++)
                    for (Index b = j; b < end; b++) move(a, b);
            }
        }
}

// (rows, cols) of leading dimension from_ld -> (cols, rows)
template <class From, class To>
static void transpose(const From* from, Index from_ld, To* to, Index to_ld, Index rows, Index cols) {
    using S = Arithmetic<From>;
    transpose_squares<S>(
        rows, cols, false, [=](Index i, Index j, int l) { return load(from + (i + l) * from_ld + j); },
        [=](Index i, Index j, int l, Vec<S> v) { store(to + (j + l) * to_ld + i, v); },
        [=](Index a, Index b) { to[b * to_ld + a] = from[a * from_ld + b]; });
}
// The same, and a number for each row added to its entries.
template <class S, class To>
static void transpose_add(const S* from, Index from_ld, const S* bias, To* to, Index to_ld, Index rows, Index cols) {
    transpose_squares<S>(
        rows, cols, false, [=](Index i, Index j, int l) { return load(from + (i + l) * from_ld + j) + bias[i + l]; },
        [=](Index i, Index j, int l, Vec<S> v) { store(to + (j + l) * to_ld + i, v); },
        [=](Index a, Index b) { to[b * to_ld + a] = from[a * from_ld + b] + bias[a]; });
}

// The same from rows that lie anywhere, times their scales, into rows of `to_ld`: what there is no row for is zero.
template <class T, class S>
static void gather(const T* const* rows, const S* scales, Index count, Index first, Index cols, S* to, Index to_ld) {
    transpose_squares<S>(
        to_ld, cols, true,
        [=](Index i, Index j, int l) {
            if (i + l >= count) return Vec<S>{};
            __builtin_prefetch(rows[i + l] + first + cols + j, 0, 2);
            return load(rows[i + l] + first + j) * scales[i + l];
        },
        [=](Index i, Index j, int l, Vec<S> v) { store(to + (j + l) * to_ld + i, v); },
        [=](Index a, Index b) { to[b * to_ld + a] = a < count ? rows[a][first + b] * scales[a] : S(0); });
}
// And back, added to the rows. The squares are read by column and written by row: i counts rows of the result.
template <class S>
static void scatter_add(const S* from, Index from_ld, S* const* rows, Index count, Index first, Index cols) {
    transpose_squares<S>(
        count, cols, true, [=](Index i, Index j, int l) { return load(from + (j + l) * from_ld + i); },
        [=](Index i, Index j, int l, Vec<S> v) {
            if (i + l >= count) return;
            S* to = rows[i + l] + first + j;
            store(to, load(to) + v);
            __builtin_prefetch(to + cols, 1, 2);
        },
        [=](Index a, Index b) { rows[a][first + b] += from[b * from_ld + a]; });
}

// Rows of a matrix -> what a micro-kernel takes, (columns, group). Column k of row i is from[row_at[i] + k_at[k]];
// `plain`: k_at[k] is k.
template <Index group, class T, class S>
static inline void pack_rows(const T* from, const Index* row_at, const Index* k_at, bool plain, Index columns,
                             S* packed) {
    constexpr Index L = Simd<S>::lanes;
    Index k = 0;
    // A whole vector is stored; what is too much of it is overwritten by the next one.
    for (; plain && group <= L && (k + L - 1) * group + L <= columns * group; k += L) {
        Vec<S> r[L];
#pragma GCC unroll 16
        for (int l = 0; l < L; l++) r[l] = l < group ? load(from + row_at[l] + k) : Vec<S>{};
        transpose_square<S>(r);
#pragma GCC unroll 16
        for (int l = 0; l < L; l++) store(packed + (k + l) * group, r[l]);
    }
    for (; k < columns; k++)
        for (Index i = 0; i < group; i++) packed[k * group + i] = from[row_at[i] + k_at[k]];
}

// Pack a share of a factor for its step: for every group of new features that a micro-kernel takes, contiguous
// (contracted, group). For the step back, new and contracted features change places.
template <class T, class S>
static void pack(const Step& s, const T* factor, S* to, bool backward, Share mine) {
    const Index *row_at = s.w_new, *k_at = s.w_contracted;
    Index rows = s.out.features, contracted = s.in.features;
    if (backward) std::swap(row_at, k_at), std::swap(rows, contracted);
    bool plain = true;
    for (Index k = 0; k < contracted; k++) plain &= k_at[k] == k;
    for (Index b = mine.first(s.batch_size); b < mine.last(s.batch_size); b++) {
        const T* from = factor + s.w_batch[b];
        S* matrix = to + b * rows * contracted;
        each_group<MICRO_ROWS>(rows, [=](auto group, Index m) {
            pack_rows<decltype(group)::value>(from, row_at + m, k_at, plain, contracted, matrix + m * contracted);
        });
    }
}

// Token-major memory behind a tile: `tokens` rows of `features`, contiguous or, if `rows` is given, at these pointers.
// Rows at pointers are scaled when they are read, and added to when they are written.
template <class T>
struct Source {
    const T* data;
    Index features, tokens;
    const T* const* rows = nullptr;
    const Arithmetic<T>* scales = nullptr;
};
template <class T>
struct Sink {
    T* data;
    Index features, tokens;
    T* const* rows = nullptr;
};

// features [first, first + count) of token-major memory -> rows of a tile; absent tokens and features are zero
template <class T, class S>
static void read_rows(Source<T> from, Index first, Index count, S* to, Index tile) {
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
template <class S, class T>
static void write_rows(const S* from, Index tile, Sink<T> to, Index first, Index count, const S* bias) {
    count = std::min(count, to.features - first);
    if (count <= 0) return;
    if constexpr (!widens<T>)
        if (to.rows) return scatter_add(from, tile, to.rows, to.tokens, first, count);
    if (bias)
        transpose_add(from, tile, bias + first, to.data + first, to.features, count, to.tokens);
    else
        transpose(from, tile, to.data + first, to.features, count, to.tokens);
}

// Call `work` with the blocks of a share of some features: with the first one, and how many these are.
template <class S, class Work>
static void each_block(Index features, Share mine, Work work) {
    constexpr Index block = 4 * Simd<S>::lanes;
    Index blocks = (features + block - 1) / block;
    for (Index i = mine.first(blocks) * block; i < std::min(features, mine.last(blocks) * block); i += block)
        work(i, std::min(block, features - i));
}
template <class T, class S>
static void read_tile(Source<T> from, S* to, Index width, Index tile, Share mine) {
    each_block<S>(width, mine, [=](Index i, Index count) { read_rows(from, i, count, to + i * tile, tile); });
}
template <class S, class T>
static void write_tile(const S* from, Index tile, Sink<T> to, const S* bias, Share mine) {
    each_block<S>(to.features, mine,
                  [=](Index i, Index count) { write_rows(from + i * tile, tile, to, i, count, bias); });
}

}  // namespace
