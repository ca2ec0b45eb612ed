// Transposition, in registers.
#pragma once

#include <algorithm>
#include <utility>

#include "vectors.h"

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
template <class S>
static void transpose(const S* from, Index from_ld, S* to, Index to_ld, Index rows, Index cols) {
    transpose_squares<S>(
        rows, cols, false, [=](Index i, Index j, int l) { return load(from + (i + l) * from_ld + j); },
        [=](Index i, Index j, int l, Vec<S> v) { store(to + (j + l) * to_ld + i, v); },
        [=](Index a, Index b) { to[b * to_ld + a] = from[a * from_ld + b]; });
}

// The same from rows that lie anywhere, times their scales, into rows of `to_ld`: what there is no row for is zero.
template <class S>
static void gather(const S* const* rows, const S* scales, Index count, Index first, Index cols, S* to, Index to_ld) {
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

}  // namespace
