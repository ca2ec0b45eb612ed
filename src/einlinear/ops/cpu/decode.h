// Decoding: forward for few tokens.
//
// Then the factors are what takes time to read, and a tile would be mostly empty. An intermediate is one plain vector for
// each token, and each matrix of a factor multiplies `count` = tokens x free pieces of it. If these are few as well,
// they are multiplied with the rows of the matrix as they lie in memory; otherwise they make up a tile.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "quantized_factors.h"

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

// Rows of a matrix, as many as a vector has lanes, that are multiplied with vectors x as they lie in memory.
template <class T, int L>
struct PlainRows {
    // from column `start` on
    const T* at[L];
    // numbers from those that are multiplied to those that are fetched from memory meanwhile
    Index start, ahead;

    // to[c R + r] = sum_k w[row + r][k] x[c][k] over k in [first, last), for C vectors and so many rows that one vector
    // holds all sums. Every weight is loaded once for all of them.
    template <int C, class S>
    inline void dot(int row, const S* const* x, Index first, Index last, S* to) const {
        constexpr int R = L / C;
        const T* const* w = at + row;
        Vec<S> sum[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) sum[i] = Vec<S>{};
        Index k = first;
        for (; k + L <= last; k += L) {
            Vec<S> values[C];
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) values[c] = load(x[c] + k);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                Vec<S> weight = load(w[r] + k - start);
                if constexpr (C > 1) keep_in_register(weight);
                __builtin_prefetch(w[r] + k - start + ahead);
#pragma GCC unroll 4
                for (int c = 0; c < C; c++) sum[c * R + r] += weight * values[c];
            }
        }
        sum_lanes<S, 1>(sum);
        store(to, sum[0]);
        for (; k < last; k++)
            for (int i = 0; i < L; i++) to[i] += (S)w[i % R][k - start] * x[i / R][k];
    }
};

// The same for codes of 8 or 4 bits, which are expanded in registers: a scale belongs to whole blocks of columns, and a
// block of vectors x is arranged.
template <int Bits>
struct CodeRows {
    static constexpr int L = Simd<float>::lanes;
    // codes of a byte, and of a block: of as many bytes as a vector has lanes
    static constexpr int PARTS = 8 / Bits, BLOCK = PARTS * L, ZERO = 1 << (Bits - 1);
    const uint8_t* at[L];
    const BFloat16* scales[L];
    // columns of a scale; bytes from those that are multiplied to those that are fetched from memory meanwhile
    Index group, ahead;

    // Arrange the blocks of a vector: first the numbers for the lower parts of bytes, then those for the upper ones.
    static void arrange(float* x, Index count) {
        for (Index k = 0; PARTS > 1 && k + BLOCK <= count; k += BLOCK) {
            float block[BLOCK];
            std::copy_n(x + k, BLOCK, block);
            for (int l = 0; l < BLOCK; l++) x[k + l] = block[l % L * PARTS + l / L];
        }
    }
    template <int C, class S>
    inline void dot(int row, const float* const* x, Index first, Index last, float* to) const {
        constexpr int R = L / C;
        // bytes that are read from memory at once
        constexpr Index LINE = 64 * PARTS;
        Vec<float> sum[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) sum[i] = Vec<float>{};
        Index k = first, whole = last - (last - first) % BLOCK, g = first / group;
        while (k < whole) {
            Index end = std::min({whole, (g + 1) * group, k + LINE});
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const uint8_t* codes = at[row + r] + k / PARTS;
                Vec<float> part[C];
#pragma GCC unroll 4
                for (int c = 0; c < C; c++) part[c] = Vec<float>{};
                __builtin_prefetch(codes + ahead);
                for (Index j = k; j < end; j += BLOCK, codes += L) {
                    const Integers bytes = load_bytes(codes);
#pragma GCC unroll 2
                    for (int i = 0; i < PARTS; i++) {
                        Integers code = PARTS == 1 ? bytes : i ? bytes >> 4 : bytes & 15;
                        Vec<float> weight = __builtin_convertvector(code - ZERO, Vec<float>);
#pragma GCC unroll 4
                        for (int c = 0; c < C; c++) part[c] += weight * load(x[c] + j + i * L);
                    }
                }
                const float scale = scales[row + r][g];
#pragma GCC unroll 4
                for (int c = 0; c < C; c++) sum[c * R + r] += part[c] * scale;
            }
            k = end;
            if (k == (g + 1) * group) g++;
        }
        sum_lanes<float, 1>(sum);
        store(to, sum[0]);
        for (; k < last; k++)
            for (int i = 0; i < L; i++) {
                int code = at[row + i % R][k / PARTS] >> (k % PARTS * Bits) & ((1 << Bits) - 1);
                to[i] += (code - ZERO) * (float)scales[row + i % R][k / group] * x[i / R][k];
            }
    }
};

// to[c L + r] = sum_k w[r][k] x[c][k] over k in [first, last) for as many rows as a vector has lanes, C vectors at a
// time if there are as many; added to what is there unless `first` is 0.
template <int C, class W, class S>
static inline void dot_blocks(const W& w, const S* const* x, Index count, Index first, Index last, S* to) {
    constexpr int L = Simd<S>::lanes, R = L / C;
    for (; count >= C; count -= C, x += C, to += C * L)
        for (int row = 0; row < L; row += R) {
            S sums[L];
            w.template dot<C, S>(row, x, first, last, sums);
            for (int c = 0; c < C; c++)
                for (int r = 0; r < R; r++) {
                    S& y = to[c * L + row + r];
                    y = first ? y + sums[c * R + r] : sums[c * R + r];
                }
        }
    if constexpr (C > 1)
        if (count) dot_blocks<C / 2>(w, x, count, first, last, to);
}

// Rows of so many weights pay for the sum at their end: then up to 15 tokens are multiplied with rows as they lie.
constexpr Index LONG_ROW = 128, MOST_TOKENS = 15;

// The features of a few tokens, one row each.
template <class S>
struct Rows {
    S* data;
    Index width;
};

// How the rows of a factor are multiplied with vectors: plain ones, or codes of 8 or 4 bits.
enum class RowKind { PLAIN, CODES8, CODES4 };
template <class S, class T>
static RowKind kind_of(const T*) {
    return RowKind::PLAIN;
}
template <class S>
static RowKind kind_of(const QuantizedFactor& f) {
    if constexpr (!std::is_same_v<S, float>) return RowKind::PLAIN;
    auto fits = [&](Index bits, Index block) { return f.bits == bits && (f.groups == 1 || f.group % block == 0); };
    if (fits(8, CodeRows<8>::BLOCK)) return RowKind::CODES8;
    return fits(4, CodeRows<4>::BLOCK) ? RowKind::CODES4 : RowKind::PLAIN;
}

// to[c L + r] = sum_k w[r][k] x[c][k] for codes from row `first` on, of `count` vectors.
template <int Bits>
static void dot_codes(const Step& s, const QuantizedFactor& f, Index b, Index first, Index rows, const float* const* x,
                      Index count, float* to) {
    constexpr int L = Simd<float>::lanes;
    CodeRows<Bits> w;
    w.group = f.group, w.ahead = std::min(L * f.row_bytes, 2 * CHUNK);
    const Index row = (s.w_batch[b] + s.w_new[first]) / s.in.features;
    for (Index m = 0; m < L; m++) {
        w.at[m] = (const uint8_t*)f.data + (row + std::min(m, rows - 1)) * f.row_bytes;
        w.scales[m] = f.scales + (row + std::min(m, rows - 1)) * f.groups;
    }
    for (Index k = 0; k < s.in.features; k += CHUNK)
        dot_blocks<4>(w, x, count, k, std::min(k + CHUNK, s.in.features), to);
}

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
static Piece<S> piece_of(const Step& s, const QuantizedFactor& factor, Index b, Index row, Index rows, Index k,
                         Index width, S* expanded) {
    expand(s, factor, b, row, rows, k, width, expanded, EXPANDED_LD);
    return {expanded, 1, EXPANDED_LD};
}

// Numbers that `decode_step` needs: a tile of contracted and new features, and rows that are expanded.
static Index decode_room(const Step& s, Index tokens, Index lanes, bool quantized) {
    return (s.in.features + lanes) * (tokens * s.free_size + lanes) + (quantized ? lanes * EXPANDED_LD : 0);
}

// A thread's share of one step for a few tokens.
template <class Factor, class S>
static void decode_step(const Step& s, const Factor& factor, Rows<const S> from, Rows<S> to, Index tokens, S* room,
                        bool add, Share mine) {
    // A unit of work is a batch entry and a block of new features, as many as a vector has lanes.
    constexpr Index L = Simd<S>::lanes;
    const Index contracted = s.in.features, count = tokens * s.free_size, tile = (count + L - 1) / L * L;
    const Index blocks = (s.out.features + L - 1) / L;
    constexpr bool quantized = std::is_same_v<Factor, QuantizedFactor>;
    bool dots = count < (contracted < LONG_ROW ? L : MOST_TOKENS + 1) && (quantized || s.w_contracted_stride == 1);
    const RowKind kind = dots ? kind_of<S>(factor) : RowKind::PLAIN;
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
                bool in_place = dots && s.in.is_run() && kind != RowKind::CODES4;
                if (dots) pieces[i] = in_place ? at + s.in.feature[0] : inputs + i * contracted;
                if (in_place) continue;
                Index item = dots ? i * contracted : i, next = dots ? 1 : tile;
                for (Index k = 0; k < contracted; k++) inputs[item + k * next] = at[s.in.feature[k]];
                if constexpr (std::is_same_v<S, float>)
                    if (kind == RowKind::CODES4) CodeRows<4>::arrange(inputs + item, contracted);
            }
            for (Index k = 0; !dots && k < contracted; k++)
                std::fill(inputs + k * tile + count, inputs + (k + 1) * tile, S(0));
            gathered = b;
        }
        if constexpr (quantized && std::is_same_v<S, float>)
            if (kind == RowKind::CODES8)
                dot_codes<8>(s, factor, b, first, rows, pieces, count, outputs);
            else if (kind == RowKind::CODES4)
                dot_codes<4>(s, factor, b, first, rows, pieces, count, outputs);
        for (Index k = 0; k < contracted && kind == RowKind::PLAIN; k += CHUNK) {
            const Index width = std::min(CHUNK, contracted - k);
            const auto w = piece_of(s, factor, b, first, rows, k, width, expanded);
            if (!dots) {
                multiply(w.data, w.wk, w.wm, inputs, each.data() + k, width, outputs, each.data(), rows, tile, k > 0);
                continue;
            }
            // where the next unit most often lies, but not farther than caches are patient
            Index ahead = quantized ? 0 : std::min(L * contracted, 2 * CHUNK);
            PlainRows<std::decay_t<decltype(*w.data)>, L> plain{{}, k, ahead};
            // beyond the last row, the last row again: its results are not used
            for (Index m = 0; m < L; m++) plain.at[m] = w.data + std::min(m, rows - 1) * w.wm;
            // several vectors at a time where that saves conversions of weights, or reads of long rows
            if (sizeof(*w.data) < sizeof(S) || contracted >= LONG_ROW)
                dot_blocks<L < 4 ? L : 4>(plain, pieces, count, k, k + width, outputs);
            else
                dot_blocks<1>(plain, pieces, count, k, k + width, outputs);
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
static bool decodes(const Program& p, Index n, Index lanes, bool quantized) {
    return std::all_of(p.steps.begin(), p.steps.end(), [=](const Step& s) {
        return (quantized || s.has_strides()) && (n < lanes || (n <= MOST_TOKENS && s.in.features >= LONG_ROW));
    });
}

template <class Factor, class T>
static void decode(const Program& p, const Factor* factors, const T* x, const T* bias, T* y, Index n, int threads) {
    using S = Arithmetic<T>;
    Index room = 0;
    for (auto& s : p.steps)
        room = std::max(room, decode_room(s, n, Simd<S>::lanes, std::is_same_v<Factor, QuantizedFactor>));
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
