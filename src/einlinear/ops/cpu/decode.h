// Forward for few tokens.
//
// With fewer tokens than a vector has lanes a tile would be mostly empty. Then a state is one plain vector per token,
// and each matrix of a factor meets `count` = tokens x columns pieces of it. If these are few as well, they are
// multiplied with the rows of the matrix as they lie in memory; otherwise they make up a tile.
#pragma once

#include <algorithm>
#include <vector>

#include "steps.h"

namespace {

// The sum of all lanes of r[i], for every i, in lane i.
template <class S, int Width>
static inline void sum_lanes(Vec<S>* r) {
    constexpr int L = Simd<S>::lanes;
    if constexpr (Width < L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; i += 2 * Width) {
            exchange<S, Width>(r[i], r[i + Width], std::make_index_sequence<L>());
            r[i] += r[i + Width];
        }
        sum_lanes<S, 2 * Width>(r);
    }
}

// to[m] = sum_k w[m][k] from[k] for as many rows as a vector has lanes
template <class S>
static inline void dot_rows(const S* const* w, const S* from, Index inner, S* to) {
    constexpr int L = Simd<S>::lanes;
    Vec<S> sum[L];
#pragma GCC unroll 16
    for (int m = 0; m < L; m++) sum[m] = Vec<S>{};
    Index k = 0;
    for (; k + L <= inner; k += L) {
        Vec<S> x = load(from + k);
#pragma GCC unroll 16
        for (int m = 0; m < L; m++) sum[m] += load(w[m] + k) * x;
    }
    sum_lanes<S, 1>(sum);
    for (; k < inner; k++)
        for (int m = 0; m < L; m++) sum[0][m] += w[m][k] * from[k];
    store(to, sum[0]);
}

template <class S>
struct States {  // of a few tokens: one row of features each
    S* data;
    Index width;
};

// A thread's share of one step for a few tokens. `room` has space for a tile of its inner and row features.
template <class S>
static void run_few(const Step& s, const S* factor, States<const S> from, States<S> to, Index tokens, S* room, bool add,
                    Share mine) {
    constexpr Index L = Simd<S>::lanes, block = L;
    Index count = tokens * s.columns, tile = (count + L - 1) / L * L, blocks = (s.rows + block - 1) / block;
    bool dots = count < L && s.w_inner == 1;
    S *inputs = room, *outputs = room + s.inner * tile;
    std::vector<Index> each(std::max(s.inner, block));  // rows of a tile, one after the other
    for (size_t i = 0; i < each.size(); i++) each[i] = i;
    Index gathered = -1;
    for (Index unit = mine.first(s.batches * blocks); unit < mine.last(s.batches * blocks); unit++) {
        Index b = unit / blocks, first = unit % blocks * block, rows = std::min(block, s.rows - first);
        for (Index i = 0; b != gathered && i < count; i++) {
            const S* at = from.data + i / s.columns * from.width + s.in_b[b] + s.in_c[i % s.columns];
            Index item = dots ? i * s.inner : i, next = dots ? 1 : tile;
            for (Index k = 0; k < s.inner; k++) inputs[item + k * next] = at[s.in_k[k]];
        }
        if (b != gathered && !dots)
            for (Index k = 0; k < s.inner; k++) std::fill(inputs + k * tile + count, inputs + (k + 1) * tile, S(0));
        gathered = b;
        const S* w = factor + s.w_b[b];
        if (dots) {
            const S* at[L];
            for (Index m = 0; m < L; m++) at[m] = w + s.w_r[std::min(first + m, s.rows - 1)];
            for (Index i = 0; i < count; i++) dot_rows(at, inputs + i * s.inner, s.inner, outputs + i * L);
        } else
            multiply(w + first * s.w_row, s.w_inner, s.w_row, inputs, each.data(), s.inner, outputs, each.data(), rows,
                     tile, false);
        for (Index i = 0; i < count; i++) {
            S* at = to.data + i / s.columns * to.width + s.out_b[b] + s.out_c[i % s.columns];
            for (Index m = 0; m < rows; m++) {
                S value = outputs[dots ? i * L + m : m * tile + i], &y = at[s.out_r[first + m]];
                y = add ? y + value : value;
            }
        }
    }
}

static bool few(const Program& p, Index n, Index lanes) {
    for (auto& term : p.terms)
        for (auto& s : term)
            if (!s.w_row || !s.w_inner) return false;
    return n < lanes;
}

template <class S>
static void forward_few(const Program& p, const S* const* factors, const S* x, const S* bias, S* y, Index n,
                        int threads) {
    constexpr Index L = Simd<S>::lanes;
    Index room = 0;
    for (auto& term : p.terms)
        for (auto& s : term) room = std::max(room, (s.inner + L) * (n * s.columns + L));
    Buffer<S> padded(n * p.width_in), result(n * p.width_out), middle(2 * n * p.widest);
    bool direct = p.width_out == p.out_features;
    States<S> last{direct ? y : result.data, p.width_out};
    Team::run(threads, [&](Team team) {
        Buffer<S> own(room);
        if (p.width_in > p.in_features)
            team.phase([&](Share mine) {
                for (Index t = mine.first(n); t < mine.last(n); t++) {
                    S* row = std::copy_n(x + t * p.in_features, p.in_features, padded.data + t * p.width_in);
                    std::fill_n(row, p.width_in - p.in_features, S(0));
                }
            });
        for (auto& term : p.terms) {
            States<const S> from{p.width_in > p.in_features ? padded.data : x, p.width_in};
            for (size_t k = 0; k < term.size(); k++) {
                const Step& s = term[k];
                bool ends = k + 1 == term.size();
                States<S> to = ends ? last : States<S>{middle.data + k % 2 * n * p.widest, s.width_out};
                team.phase([&](Share mine) {
                    run_few(s, factors[s.factor], from, to, n, own.data, ends && &term != &p.terms[0], mine);
                });
                from = {to.data, to.width};
            }
        }
        if (bias || !direct)
            team.phase([&](Share mine) {
                for (Index t = 0; t < n; t++)
                    for (Index j = mine.first(p.out_features); j < mine.last(p.out_features); j++)
                        y[t * p.out_features + j] = last.data[t * p.width_out + j] + (bias ? bias[j] : S(0));
            });
    });
}

}  // namespace
