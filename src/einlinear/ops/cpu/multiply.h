// The micro-kernels: the small matrix products that every step is made of.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace {

constexpr Index RUN = 256;  // a sum is made of runs of so many terms: in one long sum the rounding errors would grow

// to[m] (+)= sum_k w(k, m) from[k] for M rows of V vectors of tokens; w(k, m) is w[k * M + m] if packed, else
// w[k * wk + m * wm]
template <class S, int M, int V, bool Packed>
static inline void multiply_micro(const S* w, Index wk, Index wm, const S* from, const Index* from_rows, Index inner,
                                  S* to, const Index* to_rows, Index tile, bool add) {
    constexpr int L = Simd<S>::lanes;
    for (Index start = 0; start < inner; start += RUN) {
        Vec<S> sum[M][V];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[m][v] = Vec<S>{};
        for (Index k = start; k < std::min(inner, start + RUN); k++, w += Packed ? M : wk) {
            const S* row = from + from_rows[k] * tile;
            Vec<S> x[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) x[v] = load(row + v * L);
#pragma GCC unroll 16
            for (int m = 0; m < M; m++)
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) sum[m][v] += w[Packed ? m : m * wm] * x[v];
        }
        bool more = add || start;
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                S* at = to + to_rows[m] * tile + v * L;
                store(at, more ? load(at) + sum[m][v] : sum[m][v]);
            }
    }
}

template <class S, int M, int V, bool Packed>
static void multiply_rows(const S* w, Index wk, Index wm, const S* from, const Index* from_rows, Index inner, S* to,
                          const Index* to_rows, Index rows, Index tile, bool add) {
    Index m = 0;
    const Index next = Packed ? inner : wm;  // from the weights of one row to those of the next
    for (; m + M <= rows; m += M)
        for (Index t = 0; t < tile; t += V * Simd<S>::lanes)
            multiply_micro<S, M, V, Packed>(w + m * next, wk, wm, from + t, from_rows, inner, to + t, to_rows + m, tile,
                                            add);
    if constexpr (M > 1)
        if (m < rows)
            multiply_rows<S, (M > 4 ? M - 4 : M - 1), V, Packed>(w + m * next, wk, wm, from, from_rows, inner, to,
                                                                 to_rows + m, rows - m, tile, add);
}

template <class S>
static void multiply(const S* w, Index wk, Index wm, const S* from, const Index* from_rows, Index inner, S* to,
                     const Index* to_rows, Index rows, Index tile, bool add) {
    if (wk && tile % (2 * Simd<S>::lanes) == 0)
        multiply_rows<S, 8, 2, false>(w, wk, wm, from, from_rows, inner, to, to_rows, rows, tile, add);
    else if (wk)
        multiply_rows<S, 8, 1, false>(w, wk, wm, from, from_rows, inner, to, to_rows, rows, tile, add);
    else if (tile % (2 * Simd<S>::lanes))
        multiply_rows<S, MICRO_ROWS, 1, true>(w, 0, 0, from, from_rows, inner, to, to_rows, rows, tile, add);
    else
        multiply_rows<S, MICRO_ROWS, 2, true>(w, 0, 0, from, from_rows, inner, to, to_rows, rows, tile, add);
}

// gradient[m][V vectors] (+)= sum over columns and tokens of from[m][token] panel[token][V vectors]. The sum of a tile
// is added at once: in one long sum over all tokens the rounding errors would grow.
template <class S, int M, int V>
static inline void accumulate_micro(const S* from, const Index* from_rows, const Index* columns, Index count,
                                    Index tile, const S* const* panels, Index panel_ld, Index at, Index tokens,
                                    S* gradient, Index gradient_ld, bool add) {
    constexpr int L = Simd<S>::lanes;
    Vec<S> sum[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[m][v] = Vec<S>{};
    for (Index c = 0; c < count; c++) {
        const S* rows[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) rows[m] = from + (columns[c] + from_rows[m]) * tile;
        const S* panel = panels[c] + at;
        for (Index t = 0; t < tokens; t++, panel += panel_ld) {
            Vec<S> p[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) p[v] = load(panel + v * L);
#pragma GCC unroll 16
            for (int m = 0; m < M; m++)
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) sum[m][v] += rows[m][t] * p[v];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            S* to = gradient + m * gradient_ld + v * L;
            store(to, add ? load(to) + sum[m][v] : sum[m][v]);
        }
}

template <class S, int M>
static void accumulate_rows(const S* from, const Index* from_rows, Index rows, const Index* columns, Index count,
                            Index tile, const S* const* panels, Index panel_ld, Index width, Index tokens, S* gradient,
                            bool add) {
    constexpr int L = Simd<S>::lanes;
    Index m = 0;
    for (; m + M <= rows; m += M) {
        Index j = 0;
        for (; j + 2 * L <= width; j += 2 * L)
            accumulate_micro<S, M, 2>(from, from_rows + m, columns, count, tile, panels, panel_ld, j, tokens,
                                      gradient + m * width + j, width, add);
        for (; j < width; j += L)
            accumulate_micro<S, M, 1>(from, from_rows + m, columns, count, tile, panels, panel_ld, j, tokens,
                                      gradient + m * width + j, width, add);
    }
    if constexpr (M > 1)
        if (m < rows)
            accumulate_rows<S, (M > 4 ? M - 4 : M - 1)>(from, from_rows + m, rows - m, columns, count, tile, panels,
                                                        panel_ld, width, tokens, gradient + m * width, add);
}

}  // namespace
