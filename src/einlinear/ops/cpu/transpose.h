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
template <class S, int Width>
static inline void stage(Vec<S>* r) {
    constexpr int L = Simd<S>::lanes;
    if constexpr (Width < L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; i++)
            if (!(i & Width)) exchange<S, Width>(r[i], r[i + Width], std::make_index_sequence<L>());
        stage<S, 2 * Width>(r);
    }
}
// (rows, cols) of leading dimension from_ld -> (cols, rows)
template <class S>
static void transpose(const S* from, Index from_ld, S* to, Index to_ld, Index rows, Index cols) {
    constexpr int L = Simd<S>::lanes;
    for (Index i = 0; i < rows; i += L)
        for (Index j = 0; j < cols; j += L) {
            if (i + L <= rows && j + L <= cols) {
                Vec<S> r[L];
#pragma GCC unroll 16
                for (int l = 0; l < L; l++) r[l] = load(from + (i + l) * from_ld + j);
                stage<S, 1>(r);
#pragma GCC unroll 16
                for (int l = 0; l < L; l++) store(to + (j + l) * to_ld + i, r[l]);
            } else
                for (Index a = i; a < std::min(rows, i + L); a++)
                    for (Index b = j; b < std::min(cols, j + L); b++) to[b * to_ld + a] = from[a * from_ld + b];
        }
}

// The same from rows that lie anywhere, times their scales, into rows of `to_ld`: what there is no row for is zero.
template <class S>
static void gather(const S* const* rows, const S* scales, Index count, Index first, Index cols, S* to, Index to_ld) {
    constexpr int L = Simd<S>::lanes;
    for (Index i = 0; i < to_ld; i += L)
        for (Index j = 0; j < cols; j += L) {
            if (j + L <= cols) {
                Vec<S> r[L];
#pragma GCC unroll 16
                for (int l = 0; l < L; l++) {
                    r[l] = i + l < count ? load(rows[i + l] + first + j) * scales[i + l] : Vec<S>{};
                    if (i + l < count) __builtin_prefetch(rows[i + l] + first + cols + j, 0, 2);
                }
                stage<S, 1>(r);
#pragma GCC unroll 16
                for (int l = 0; l < L; l++) store(to + (j + l) * to_ld + i, r[l]);
            } else
                for (Index a = i; a < i + L; a++)
                    for (Index b = j; b < cols; b++)
                        to[b * to_ld + a] = a < count ? rows[a][first + b] * scales[a] : S(0);
        }
}
// And back, added to the rows.
template <class S>
static void scatter_add(const S* from, Index from_ld, S* const* rows, Index count, Index first, Index cols) {
    constexpr int L = Simd<S>::lanes;
    for (Index i = 0; i < count; i += L)
        for (Index j = 0; j < cols; j += L) {
            if (j + L <= cols) {
                Vec<S> r[L];
#pragma GCC unroll 16
                for (int l = 0; l < L; l++) r[l] = load(from + (j + l) * from_ld + i);
                stage<S, 1>(r);
#pragma GCC unroll 16
                for (int l = 0; l < L; l++)
                    if (i + l < count) {
                        S* to = rows[i + l] + first + j;
                        store(to, load(to) + r[l]);
                        __builtin_prefetch(to + cols, 1, 2);
                    }
            } else
                for (Index a = i; a < std::min(count, i + L); a++)
                    for (Index b = j; b < cols; b++) rows[a][first + b] += from[b * from_ld + a];
        }
}

}  // namespace
