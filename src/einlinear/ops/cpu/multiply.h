// The micro-kernels: the small matrix products that every step is made of.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace {

// A sum is made of runs of so many terms: in one long sum the rounding errors would grow.
constexpr Index RUN = 256;

template <int N>
using Constant = std::integral_constant<int, N>;

// Call `work` for groups of at most M rows, with the size of each (a constant) and its first row.
template <int M, class Work>
__attribute__((always_inline)) static inline void each_group(Index rows, Work work, Index first = 0) {
    for (; first + M <= rows; first += M) work(Constant<M>(), first);
    if constexpr (M > 1)
        if (first < rows) each_group<(M > 4 ? M - 4 : M - 1)>(rows, work, first);
}

// The sums of a micro-kernel, M rows of V vectors. All loops are unrolled, so that they stay in registers; `weight` and
// `row` capture by value for the same reason.
template <class S, int M, int V>
struct Sums {
    static constexpr int L = Simd<S>::lanes;
    Vec<S> sum[M][V];

    inline Sums() {
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[m][v] = Vec<S>{};
    }
    // sum[m] += weight(m) * row
    template <class Weight, class T>
    inline void add(Weight weight, const T* row) {
        Vec<S> x[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) x[v] = load(row + v * L);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[m][v] += S(weight(m)) * x[v];
    }
    // row(m) (+)= sum[m]
    template <class Row>
    inline void write(Row row, bool more) const {
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                S* to = row(m) + v * L;
                store(to, more ? load(to) + sum[m][v] : sum[m][v]);
            }
    }
};

// to[m] (+)= sum_k w(k, m) from[k] for M rows of V vectors of tokens; w(k, m) is w[k * M + m] if packed, else
// w[k * wk + m * wm]
template <int M, int V, bool Packed, class T, class S>
static inline void multiply_micro(const T* w, Index wk, Index wm, const S* from, const Index* from_rows,
                                  Index contracted, S* to, const Index* to_rows, Index tile, bool add) {
    for (Index start = 0; start < contracted; start += RUN) {
        Sums<S, M, V> sums;
        for (Index k = start; k < std::min(contracted, start + RUN); k++, w += Packed ? M : wk)
            sums.add([=](int m) { return w[Packed ? m : m * wm]; }, from + from_rows[k] * tile);
        sums.write([=](int m) { return to + to_rows[m] * tile; }, add || start);
    }
}

// The same for any number of rows and a tile of tokens. Without strides the weights are packed.
template <class T, class S>
static void multiply(const T* w, Index wk, Index wm, const S* from, const Index* from_rows, Index contracted, S* to,
                     const Index* to_rows, Index rows, Index tile, bool add) {
    auto multiply_rows = [=](auto vectors, auto packed) {
        constexpr int V = decltype(vectors)::value;
        constexpr bool Packed = decltype(packed)::value;
        each_group<Packed ? MICRO_ROWS : 8>(rows, [=](auto group, Index m) {
            for (Index t = 0; t < tile; t += V * Simd<S>::lanes)
                multiply_micro<decltype(group)::value, V, Packed>(w + m * (Packed ? contracted : wm), wk, wm,
                                                                     from + t, from_rows, contracted, to + t,
                                                                     to_rows + m, tile, add);
        });
    };
    bool even = tile % (2 * Simd<S>::lanes) == 0;
    if (wk)
        even ? multiply_rows(Constant<2>(), std::false_type()) : multiply_rows(Constant<1>(), std::false_type());
    else
        even ? multiply_rows(Constant<2>(), std::true_type()) : multiply_rows(Constant<1>(), std::true_type());
}

// gradient[m][V vectors] (+)= sum over free axes and tokens of from[m][token] panel[token][V vectors]. The sum of a
// tile is added at once: in one long sum over all tokens the rounding errors would grow.
template <int M, int V, class S, class T>
static inline void accumulate_micro(const S* from, const Index* from_rows, const Index* free, Index count, Index tile,
                                    const T* const* panels, Index panel_ld, Index at, Index tokens, S* gradient,
                                    Index gradient_ld, bool add) {
    Sums<S, M, V> sums;
    for (Index c = 0; c < count; c++) {
        const S* rows[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) rows[m] = from + (free[c] + from_rows[m]) * tile;
        const T* panel = panels[c] + at;
        for (Index t = 0; t < tokens; t++, panel += panel_ld) sums.add([=](int m) { return rows[m][t]; }, panel);
    }
    sums.write([=](int m) { return gradient + m * gradient_ld; }, add);
}

// The same for any number of rows, and vectors that make up `width`.
template <class S, class T>
static void accumulate(const S* from, const Index* from_rows, Index rows, const Index* free, Index count, Index tile,
                       const T* const* panels, Index panel_ld, Index width, Index tokens, S* gradient, bool add) {
    each_group<MICRO_ROWS>(rows, [=](auto group, Index m) {
        auto accumulate_vectors = [=](auto vectors, Index j) __attribute__((always_inline)) {
            accumulate_micro<decltype(group)::value, decltype(vectors)::value>(from, from_rows + m, free, count,
                                                                                  tile, panels, panel_ld, j, tokens,
                                                                                  gradient + m * width + j, width, add);
        };
        constexpr int L = Simd<S>::lanes;
        Index j = 0;
        for (; j + 2 * L <= width; j += 2 * L) accumulate_vectors(Constant<2>(), j);
        for (; j < width; j += L) accumulate_vectors(Constant<1>(), j);
    });
}

}  // namespace
