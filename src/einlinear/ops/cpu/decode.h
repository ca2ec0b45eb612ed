// Decoding: forward for few tokens.
//
// Then the factors are what takes time to read, and a tile would be mostly empty. An intermediate is one plain vector for
// each token, and each matrix of a factor multiplies `count` = tokens x free pieces of it. If these are few as well,
// they are multiplied with the rows of the matrix as they lie in memory; otherwise they make up a tile.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "stored.h"

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

// to[c R + r] = sum_k w[r][k] x[c][first + k] over k < width, for C vectors and so many rows that one vector holds all
// sums. Every weight is loaded once for all of them, and those `ahead` are fetched from memory meanwhile.
template <int C, class T, class S>
static inline void dot_rows(const T* const* w, const S* const* x, Index first, Index width, Index ahead, S* to) {
    constexpr int L = Simd<S>::lanes, R = L / C;
    Vec<S> sum[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) sum[i] = Vec<S>{};
    Index k = 0;
    for (; k + L <= width; k += L) {
        Vec<S> at[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) at[c] = load(x[c] + first + k);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            Vec<S> weight = load(w[r] + k);
            if constexpr (C > 1) keep_in_register(weight);
            __builtin_prefetch(w[r] + k + ahead);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sum[c * R + r] += weight * at[c];
        }
    }
    sum_lanes<S, 1>(sum);
    store(to, sum[0]);
    for (; k < width; k++)
        for (int i = 0; i < L; i++) to[i] += (S)w[i % R][k] * x[i / R][first + k];
}

// to[c L + r] = sum_k w[r][k] x[c][first + k] for as many rows as a vector has lanes, C vectors at a time if there are as
// many; added to what is there unless `first` is 0.
template <int C, class T, class S>
static inline void dot_blocks(const T* const* w, const S* const* x, Index count, Index first, Index width, Index ahead,
                              S* to) {
    constexpr int L = Simd<S>::lanes, R = L / C;
    for (; count >= C; count -= C, x += C, to += C * L)
        for (int row = 0; row < L; row += R) {
            S sums[L];
            dot_rows<C>(w + row, x, first, width, ahead, sums);
            for (int c = 0; c < C; c++)
                for (int r = 0; r < R; r++) {
                    S& y = to[c * L + row + r];
                    y = first ? y + sums[c * R + r] : sums[c * R + r];
                }
        }
    if constexpr (C > 1)
        if (count) dot_blocks<C / 2>(w, x, count, first, width, ahead, to);
}

// Rows of so many weights pay for the sum at their end: then up to 15 tokens are multiplied with rows as they lie.
constexpr Index LONG_ROW = 128, MOST_TOKENS = 15;

// The features of a few tokens, one row each.
template <class S>
struct Rows {
    S* data;
    Index width;
};

// Rows and columns of a matrix, and their strides: as they lie in memory, or expanded.
template <class T>
struct Piece {
    const T* data;
    Index wk, wm;
};
template <class T, class S>
static Piece<T> piece_of(const Step& s, const T* factor, Index b, Index row, Index, Index k, Index, S*) {
    Index wk = s.w_contracted_stride, wm = s.w_new_stride;
    return {factor + s.w_batch[b] + row * wm + k * wk, wk, wm};
}
template <class S>
static Piece<S> piece_of(const Step& s, const StoredFactor& factor, Index b, Index row, Index rows, Index k, Index width,
                         S* expanded) {
    expand(s, factor, b, row, rows, k, width, expanded, EXPANDED_LD);
    return {expanded, 1, EXPANDED_LD};
}

// Numbers that `decode_step` needs: a tile of contracted and new features, and rows that are expanded.
static Index decode_room(const Step& s, Index tokens, Index lanes, bool stored) {
    return (s.in.features + lanes) * (tokens * s.free_size + lanes) + (stored ? lanes * EXPANDED_LD : 0);
}

// A thread's share of one step for a few tokens.
template <class Factor, class S>
static void decode_step(const Step& s, const Factor& factor, Rows<const S> from, Rows<S> to, Index tokens, S* room,
                        bool add, Share mine) {
    // A unit of work is a batch entry and a block of new features, as many as a vector has lanes.
    constexpr Index L = Simd<S>::lanes;
    const Index contracted = s.in.features, count = tokens * s.free_size, tile = (count + L - 1) / L * L;
    const Index blocks = (s.out.features + L - 1) / L;
    constexpr bool stored = std::is_same_v<Factor, StoredFactor>;
    bool dots = count < (contracted < LONG_ROW ? L : MOST_TOKENS + 1) && (stored || s.w_contracted_stride == 1);
    S *inputs = room, *outputs = inputs + contracted * tile, *expanded = outputs + L * tile;
    const S* pieces[std::max(MOST_TOKENS, L)];
    // rows of a tile, one after the other
    std::vector<Index> each(dots ? 0 : std::max(contracted, L));
    std::iota(each.begin(), each.end(), 0);
    Index gathered = -1;
    for (Index unit = mine.first(s.batch_size * blocks); unit < mine.last(s.batch_size * blocks); unit++) {
        Index b = unit / blocks, first = unit % blocks * L, rows = std::min(L, s.out.features - first);
        // Units of the same batch entry read the same pieces: these are gathered once, as vectors or as a tile, or are
        // read where they lie.
        if (b != gathered) {
            for (Index i = 0; i < count; i++) {
                const S* at = from.data + i / s.free_size * from.width + s.in.batch[b] + s.in.free[i % s.free_size];
                if (dots) pieces[i] = s.in.is_run() ? at + s.in.feature[0] : inputs + i * contracted;
                if (dots && s.in.is_run()) continue;
                Index item = dots ? i * contracted : i, next = dots ? 1 : tile;
                for (Index k = 0; k < contracted; k++) inputs[item + k * next] = at[s.in.feature[k]];
            }
            for (Index k = 0; !dots && k < contracted; k++)
                std::fill(inputs + k * tile + count, inputs + (k + 1) * tile, S(0));
            gathered = b;
        }
        for (Index k = 0; k < contracted; k += CHUNK) {
            const Index width = std::min(CHUNK, contracted - k);
            const auto w = piece_of(s, factor, b, first, rows, k, width, expanded);
            if (!dots) {
                multiply(w.data, w.wk, w.wm, inputs, each.data() + k, width, outputs, each.data(), rows, tile, k > 0);
                continue;
            }
            // beyond the last row, the last row again: its results are not used
            decltype(w.data) at[L];
            for (Index m = 0; m < L; m++) at[m] = w.data + std::min(m, rows - 1) * w.wm;
            // where the next unit most often lies, but not farther than caches are patient
            Index ahead = stored ? 0 : std::min(L * contracted, 2 * CHUNK);
            // several vectors at a time where that saves conversions of weights, or reads of long rows
            if (sizeof(*w.data) < sizeof(S) || contracted >= LONG_ROW)
                dot_blocks<L < 4 ? L : 4>(at, pieces, count, k, width, ahead, outputs);
            else
                dot_blocks<1>(at, pieces, count, k, width, ahead, outputs);
        }
        for (Index i = 0; i < count; i++) {
            S* at = to.data + i / s.free_size * to.width + s.out.batch[b] + s.out.free[i % s.free_size];
            if (dots && rows == L && s.out.is_run()) {
                S* y = at + s.out.feature[first];
                Vec<S> values = load(outputs + i * L);
                store(y, add ? load(y) + values : values);
                continue;
            }
            for (Index m = 0; m < rows; m++) {
                S value = outputs[dots ? i * L + m : m * tile + i], &y = at[s.out.feature[first + m]];
                y = add ? y + value : value;
            }
        }
    }
}

// Whether a call takes this path: fewer tokens than fill a tile or, with long rows, a few more; and factors that are
// stored, or whose matrices have constant strides.
static bool decodes(const Program& p, Index n, Index lanes, bool stored) {
    return std::all_of(p.steps.begin(), p.steps.end(), [=](const Step& s) {
        return (stored || s.has_strides()) && (n < lanes || (n <= MOST_TOKENS && s.in.features >= LONG_ROW));
    });
}

template <class Factor, class T>
static void decode(const Program& p, const Factor* factors, const T* x, const T* bias, T* y, Index n, int threads) {
    using S = Arithmetic<T>;
    Index room = 0;
    for (auto& s : p.steps)
        room = std::max(room, decode_room(s, n, Simd<S>::lanes, std::is_same_v<Factor, StoredFactor>));
    Buffer<S> padded(n * p.width_in), result(n * p.width_out), intermediates(2 * n * p.widest);
    // Without missing inputs the first steps read x, and without surplus outputs the last ones write to y.
    bool copies_in = widens<T> || p.width_in > p.in_features, copies_out = widens<T> || p.width_out > p.out_features;
    Rows<const S> input{copies_in ? padded.data : (const S*)x, p.width_in};
    Rows<S> last{copies_out ? result.data : (S*)y, p.width_out};
    Team::run(threads, [&](Team team) {
        Buffer<S> own(room);
        if (copies_in)
            team.phase([&](Share mine) {
                for (Index t = mine.first(n); t < mine.last(n); t++) {
                    S* row = padded.data + t * p.width_in;
                    convert(x + t * p.in_features, row, 0, p.in_features);
                    std::fill(row + p.in_features, row + p.width_in, S(0));
                }
            });
        Rows<const S> from = input;
        for (size_t k = 0; k < p.steps.size(); k++) {
            const Step& s = p.steps[k];
            if (s.begins) from = input;
            Rows<S> to = s.ends ? last : Rows<S>{intermediates.data + k % 2 * n * p.widest, s.out.width};
            team.phase(
                [&](Share mine) { decode_step(s, factors[k], from, to, n, own.data, s.ends && s.term > 0, mine); });
            from = {to.data, to.width};
        }
        if (bias || copies_out)
            team.phase([&](Share mine) {
                for (Index t = 0; t < n; t++)
                    for (Index j = mine.first(p.out_features); j < mine.last(p.out_features); j++)
                        y[t * p.out_features + j] = last.data[t * p.width_out + j] + (bias ? (S)bias[j] : S(0));
            });
    });
}

}  // namespace
