// The micro-kernels: the small matrix products that every step is made of.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace {

// A sum is made of runs of so many terms: in one long sum the rounding errors would grow.
constexpr Index RUN = 256;

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
    template <class Weight>
    inline void add(Weight weight, const S* row) {
        Vec<S> x[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) x[v] = load(row + v * L);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[m][v] += weight(m) * x[v];
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
template <class S, int M, int V, bool Packed>
static inline void multiply_micro(const S* w, Index wk, Index wm, const S* from, const Index* from_rows,
                                  Index contracted, S* to, const Index* to_rows, Index tile, bool add) {
    for (Index start = 0; start < contracted; start += RUN) {
        Sums<S, M, V> sums;
        for (Index k = start; k < std::min(contracted, start + RUN); k++, w += Packed ? M : wk)
            sums.add([=](int m) { return w[Packed ? m : m * wm]; }, from + from_rows[k] * tile);
        sums.write([=](int m) { return to + to_rows[m] * tile; }, add || start);
    }
}

template <class S, int M, int V, bool Packed>
static void multiply_rows(const S* w, Index wk, Index wm, const S* from, const Index* from_rows, Index contracted,
                          S* to, const Index* to_rows, Index rows, Index tile, bool add) {
    Index m = 0;
    // from the weights of one row to those of the next
    const Index next = Packed ? contracted : wm;
    for (; m + M <= rows; m += M)
        for (Index t = 0; t < tile; t += V * Simd<S>::lanes)
            multiply_micro<S, M, V, Packed>(w + m * next, wk, wm, from + t, from_rows, contracted, to + t, to_rows + m,
                                            tile, add);
    if constexpr (M > 1)
        if (m < rows)
            multiply_rows<S, (M > 4 ? M - 4 : M - 1), V, Packed>(w + m * next, wk, wm, from, from_rows, contracted, to,
                                                                 to_rows + m, rows - m, tile, add);
}

template <class S>
static void multiply(const S* w, Index wk, Index wm, const S* from, const Index* from_rows, Index contracted, S* to,
                     const Index* to_rows, Index rows, Index tile, bool add) {
    if (wk && tile % (2 * Simd<S>::lanes) == 0)
        multiply_rows<S, 8, 2, false>(w, wk, wm, from, from_rows, contracted, to, to_rows, rows, tile, add);
    else if (wk)
        multiply_rows<S, 8, 1, false>(w, wk, wm, from, from_rows, contracted, to, to_rows, rows, tile, add);
    else if (tile % (2 * Simd<S>::lanes))
        multiply_rows<S, MICRO_ROWS, 1, true>(w, 0, 0, from, from_rows, contracted, to, to_rows, rows, tile, add);
    else
        multiply_rows<S, MICRO_ROWS, 2, true>(w, 0, 0, from, from_rows, contracted, to, to_rows, rows, tile, add);
}

// gradient[m][V vectors] (+)= sum over free axes and tokens of from[m][token] panel[token][V vectors]. The sum of a
// tile is added at once: in one long sum over all tokens the rounding errors would grow.
template <class S, int M, int V>
static inline void accumulate_micro(const S* from, const Index* from_rows, const Index* free, Index count, Index tile,
                                    const S* const* panels, Index panel_ld, Index at, Index tokens, S* gradient,
                                    Index gradient_ld, bool add) {
    Sums<S, M, V> sums;
    for (Index c = 0; c < count; c++) {
        const S* rows[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) rows[m] = from + (free[c] + from_rows[m]) * tile;
        const S* panel = panels[c] + at;
        for (Index t = 0; t < tokens; t++, panel += panel_ld) sums.add([=](int m) { return rows[m][t]; }, panel);
    }
    sums.write([=](int m) { return gradient + m * gradient_ld; }, add);
}

template <class S, int M>
static void accumulate_rows(const S* from, const Index* from_rows, Index rows, const Index* free, Index count,
                            Index tile, const S* const* panels, Index panel_ld, Index width, Index tokens, S* gradient,
                            bool add) {
    constexpr int L = Simd<S>::lanes;
    Index m = 0;
    for (; m + M <= rows; m += M) {
        Index j = 0;
        for (; j + 2 * L <= width; j += 2 * L)
            accumulate_micro<S, M, 2>(from, from_rows + m, free, count, tile, panels, panel_ld, j, tokens,
                                      gradient + m * width + j, width, add);
        for (; j < width; j += L)
            accumulate_micro<S, M, 1>(from, from_rows + m, free, count, tile, panels, panel_ld, j, tokens,
                                      gradient + m * width + j, width, add);
    }
    if constexpr (M > 1)
        if (m < rows)
            accumulate_rows<S, (M > 4 ? M - 4 : M - 1)>(from, from_rows + m, rows - m, free, count, tile, panels,
                                                        panel_ld, width, tokens, gradient + m * width, add);
}

}  // namespace
