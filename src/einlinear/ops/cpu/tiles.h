// A tile through all steps: forward, and back with the gradients of factors.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "quantized_factors.h"

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

// All factors as their steps, or the steps back, multiply with them; of stacked ones those of matrix `i`. A thread
// packs its share of them. For few tokens that would not pay: factors with constant strides are read as they lie in
// memory.
template <class T, class S>
static std::vector<Weights<S>> all_weights(const Program& p, const T* const* factors, Index i, S* packed, bool backward,
                                           bool small, Share mine) {
    std::vector<Weights<S>> result;
    for (auto& s : p.steps) {
        const T* factor = *factors++ + i * s.entries();
        if (!widens<T> && small && s.has_strides()) {
            Index wk = s.w_contracted_stride, wm = s.w_new_stride;
            if (backward) std::swap(wk, wm);
            result.push_back({(const S*)factor, s.w_batch, 0, wk, wm});
            continue;
        }
        pack(s, factor, packed, backward, mine);
        result.push_back({packed, nullptr, s.out.features * s.in.features, 0, 0});
        packed += s.entries();
    }
    return result;
}

// The same for quantised factors, which are packed in any case.
template <class S>
static std::vector<Weights<S>> all_weights(const Program& p, const QuantizedFactor* factors, Index, S* packed, bool,
                                           bool, Share mine) {
    std::vector<Weights<S>> result;
    for (auto& s : p.steps) {
        pack(s, *factors++, packed, mine);
        result.push_back({packed, nullptr, s.out.features * s.in.features, 0, 0});
        packed += s.entries();
    }
    return result;
}

// What to do with the rows that a product has written, while they are in the first cache: `count` rows, at `first` plus
// each of the offsets.
using Finish = std::function<void(Index first, const Index* offsets, Index count)>;

// All products of a step. Where rows are neighbours the first step can read token-major memory and the last one write
// it, a product at a time, through `scratch`: then these ends need no room in cache.
template <class S, class From, class To>
static void run_step(const Step& s, const Weights<S>& w, const Side& in, const Side& out, const S* from, S* to,
                     const Source<From>* source, const Sink<To>* sink, const S* bias, S* scratch, Index tile, bool add,
                     Share mine, const Finish* finish = nullptr) {
    for (Index p = mine.first(s.products()); p < mine.last(s.products()); p++) {
        Index b = p / s.free_size, c = p % s.free_size;
        Index in_at = in.batch[b] + in.free[c], out_at = out.batch[b] + out.free[c];
        const S* rows_in = source ? scratch : from + in_at * tile;
        S* rows_out = sink ? scratch + in.features * tile : to + out_at * tile;
        if (source) read_rows(*source, in_at, in.features, scratch, tile);
        multiply(w.at(b), w.wk, w.wm, rows_in, in.feature, in.features, rows_out, out.feature, out.features, tile, add);
        if (sink) write_rows(rows_out, tile, *sink, out_at, out.features, bias);
        if (finish) (*finish)(out_at, out.feature, out.features);
    }
}

// Both ends of a tile. Where the first step can read token-major memory itself, and the last one write it, they need no
// rows in the tile: with several terms these steps would read it again, or add to it.
struct Ends {
    bool stream_in, stream_out;
    Index rows_in, rows_out;

    // `has_in`, `has_out`: whether there is token-major memory, else the ends are rows in any case. With a single step,
    // its gradients need the rows.
    Ends(const Program& p, bool backward, bool has_in = true, bool has_out = true) {
        bool single = p.terms == 1 && (!backward || p.steps.size() > 1);
        stream_in = has_in && single && p.steps.front().in.is_run();
        stream_out = has_out && single && p.steps.back().out.is_run();
        rows_in = stream_in ? 0 : p.width_in, rows_out = stream_out ? 0 : p.width_out;
    }
};

// A tile forward through all steps.
template <class S>
struct ForwardTile {
    const Program& p;
    const Ends& ends;
    const std::vector<Weights<S>>& w;
    const S* bias;
    Index tile;
    S *xs, *ys, *scratch;

    // Intermediates are written one after the other. Without a source the input is in `xs` already, without a sink the
    // output stays in `ys`, where it is finished; where it is not wanted, only intermediates are computed.
    template <class From, class To>
    void run(const Source<From>* source, S* intermediates, const Sink<To>* sink, bool wants_output, Team team,
             const Finish* finish = nullptr) const {
        if (source && !ends.stream_in) team.phase([&](Share mine) { read_tile(*source, xs, p.width_in, tile, mine); });
        const S* input = xs;
        for (size_t k = 0; k < p.steps.size(); k++) {
            const Step& s = p.steps[k];
            if (s.begins) input = xs;
            if (s.ends && !wants_output) continue;
            team.phase([&](Share mine) {
                run_step(s, w[k], s.in, s.out, input, s.ends ? ys : intermediates,
                         s.begins && ends.stream_in ? source : nullptr, s.ends && ends.stream_out ? sink : nullptr,
                         bias, scratch, tile, s.ends && s.term > 0, mine,
                         s.ends && s.term + 1 == p.terms ? finish : nullptr);
            });
            input = intermediates;
            if (!s.ends) intermediates += s.out.width * tile;
        }
        if (wants_output && sink && !ends.stream_out)
            team.phase([&](Share mine) { write_tile(ys, tile, *sink, bias, mine); });
    }
};

// The gradient of a factor is a sum over tokens of products of its step's input and of the gradient of its output. One
// of them is read feature-major, a token at a time; the other token-major, in vectors of features. At the ends of a
// term that is the input or the gradient of the output as they lie in memory.
struct FactorGradient {
    // whether the vectors are of contracted features, else of new ones
    bool by_contracted;
    const Side &vectors, &other;
    // features of the vectors, rounded up to whole ones; where the sums of this factor lie among those of all
    Index padded, offset;

    // of one batch entry
    Index entries() const { return other.features * padded; }
};

// Those of all factors, and what they take.
template <class S>
struct FactorGradients {
    std::vector<FactorGradient> of;
    Index panel = 0, entries = 0;

    FactorGradients(const Program& p, Index tile) {
        constexpr Index L = Simd<S>::lanes;
        for (auto& s : p.steps) {
            bool by_contracted = s.begins || !s.ends;
            const Side &vectors = by_contracted ? s.in : s.out, &other = by_contracted ? s.out : s.in;
            of.push_back({by_contracted, vectors, other, (vectors.features + L - 1) / L * L, entries});
            panel = std::max(panel, s.free_size * of.back().padded * tile);
            entries += s.batch_size * of.back().entries();
        }
    }
};

// This tile's share into, or added to, `sum`, laid out (batch, other features, padded vectors). The vectors lie
// token-major in `major`, or else in rows of the tile.
template <class T, class S>
static void add_factor_gradient(const Step& s, const FactorGradient& g, const Source<T>* major, const S* vectors_rows,
                                const S* other_rows, Index tokens, Index tile, S* panel_memory, S* sum, bool add,
                                Share mine) {
    std::vector<const T*> in_place(s.free_size);
    std::vector<const S*> panels(s.free_size);
    const Index width = g.vectors.features;
    bool whole = major && g.vectors.is_run() && width == g.padded;
    for (Index b = mine.first(s.batch_size); b < mine.last(s.batch_size); b++) {
        auto accumulate_vectors = [&](auto& vectors, Index ld) {
            accumulate(other_rows + g.other.batch[b] * tile, g.other.feature, g.other.features, g.other.free,
                       s.free_size, tile, vectors.data(), ld, g.padded, tokens, sum + b * g.entries(), add);
        };
        // Vectors that lie in token-major memory, none of them in the padding, are read there.
        bool direct = whole;
        for (Index c = 0; direct && c < s.free_size; c++) {
            Index at = g.vectors.batch[b] + g.vectors.free[c];
            direct = at + width <= major->features;
            in_place[c] = major->data + at;
        }
        if (direct) {
            accumulate_vectors(in_place, major->features);
            continue;
        }
        // Others are copied into panels, which are zero in the padding.
        for (Index c = 0; c < s.free_size; c++) {
            Index at = g.vectors.batch[b] + g.vectors.free[c];
            S* panel = panel_memory + c * tile * g.padded;
            panels[c] = panel;
            if (!major) {
                const Index padded = g.padded, *features = g.vectors.feature;
                const S* rows = vectors_rows + at * tile;
                transpose_squares<S>(
                    padded, tile, true,
                    [=](Index k, Index t, int l) {
                        return k + l < width ? load(rows + features[k + l] * tile + t) : Vec<S>{};
                    },
                    [=](Index k, Index t, int l, Vec<S> v) { store(panel + (t + l) * padded + k, v); },
                    [](Index, Index) {});
                continue;
            }
            for (Index t = 0; t < tokens; t++)
                for (Index k = 0; k < g.padded; k++) {
                    Index feature = k < width ? at + g.vectors.feature[k] : major->features;
                    bool present = feature < major->features;
                    panel[t * g.padded + k] = present ? (S)major->data[t * major->features + feature] : S(0);
                }
        }
        accumulate_vectors(panels, g.padded);
    }
}

// The sums of the threads -> the gradients of all factors, or those of matrix `i` of stacked ones; zero without sums.
template <class S, class T>
static void write_factor_gradients(const Program& p, const FactorGradients<S>& gradients, const std::vector<S*>& sums,
                                   T* const* dfactors, Index i, Share mine) {
    for (size_t j = 0; j < p.steps.size(); j++) {
        const Step& s = p.steps[j];
        const FactorGradient& g = gradients.of[j];
        if (!dfactors[j]) continue;
        T* to = dfactors[j] + i * s.entries();
        if (sums.empty()) {
            std::fill_n(to, s.entries(), T(0));
            continue;
        }
        for (Index b = mine.first(s.batch_size); b < mine.last(s.batch_size); b++) {
            S* total = sums[0] + g.offset + b * g.entries();
            T* into = to + s.w_batch[b];
            for (size_t c = 1; c < sums.size(); c++)
                for (Index e = 0; e < g.entries(); e++) total[e] += sums[c][g.offset + b * g.entries() + e];
            if (!g.by_contracted && s.w_new_stride && s.w_contracted_stride == 1)
                transpose(total, g.padded, into, s.w_new_stride, s.in.features, s.out.features);
            else
                for (Index r = 0; r < s.out.features; r++)
                    for (Index k = 0; k < s.in.features; k++)
                        into[s.w_new[r] + s.w_contracted[k]] =
                            total[g.by_contracted ? r * g.padded + k : k * g.padded + r];
        }
    }
}

// Which factors' gradients are wanted.
template <class T>
static std::vector<bool> wanted_of(const Program& p, T* const* dfactors) {
    std::vector<bool> wanted;
    for (size_t k = 0; k < p.steps.size(); k++) wanted.push_back(dfactors[k]);
    return wanted;
}

// A tile back through all steps: its share of the factors' gradients, and the gradient of the input.
template <class S>
struct BackwardTile {
    const Program& p;
    const Ends& ends;
    const FactorGradients<S>& gradients;
    const std::vector<Weights<S>>&w, &w_back;
    // whether the gradient of a factor is
    std::vector<bool> wanted;
    bool recompute, wants_x;
    Index tile;
    // rows of the tile: gradients of the output and of the input, two gradients between steps in turn, and
    // intermediates that are recomputed
    S *dys = nullptr, *dxs = nullptr, *turns = nullptr, *recomputed = nullptr, *panels = nullptr, *scratch = nullptr;

    static Index room(const Program& p, const Ends& ends, bool recompute, Index tile) {
        return (ends.rows_out + ends.rows_in + 2 * p.widest + (recompute ? p.intermediates : 0)) * tile;
    }
    // Lay out memory of this room.
    void set_memory(S* memory) {
        dys = memory, dxs = dys + ends.rows_out * tile, turns = dxs + ends.rows_in * tile;
        recomputed = turns + 2 * p.widest * tile;
    }

    // Gradients of factors go into `sum`, or are added to it; that of the input goes to `sink`. An input that is not in
    // token-major memory is in `xs`, and the gradient of such an output in `dys`; without a sink, that of the input
    // stays in `dxs`. It is added to what is there if `more`.
    template <class T>
    void run(const Source<T>* input, const S* xs, const Source<T>* output, const S* saved, const Sink<T>* sink, S* sum,
             bool add, Index tokens, Team team, bool more = false) const {
        // The input lies where its gradient will be.
        if (recompute)
            ForwardTile<S>{p, ends, w, nullptr, tile, dxs, nullptr, scratch}.run(input, recomputed,
                                                                                 (const Sink<T>*)nullptr, false, team);
        if (output && !ends.stream_out)
            team.phase([&](Share mine) { read_tile(*output, dys, p.width_out, tile, mine); });
        const S *intermediates = (saved ? saved : recomputed) + p.intermediates * tile, *g = dys;
        for (size_t k = p.steps.size(); k-- > 0;) {
            const Step& s = p.steps[k];
            const FactorGradient& gradient = gradients.of[k];
            if (s.ends) g = dys;
            if (!s.begins) intermediates -= s.in.width * tile;
            const Source<T>* major = s.begins ? input : (s.ends ? output : nullptr);
            const S* from = s.begins ? xs : intermediates;
            S* to = s.begins ? dxs : turns + k % 2 * p.widest * tile;
            team.phase([&](Share mine) {
                if (wanted[k])
                    add_factor_gradient(s, gradient, major, gradient.by_contracted ? from : g,
                                        gradient.by_contracted ? g : from, tokens, tile, panels,
                                        sum + gradient.offset, add, mine);
                if (s.begins && !wants_x) return;
                run_step(s, w_back[k], s.out, s.in, g, to, s.ends && ends.stream_out ? output : nullptr,
                         s.begins && ends.stream_in ? sink : nullptr, (const S*)nullptr, scratch, tile,
                         s.begins && (s.term + 1 < p.terms || more), mine);
            });
            g = to;
        }
        if (wants_x && sink && !ends.stream_in)
            team.phase([&](Share mine) { write_tile(dxs, tile, *sink, (const S*)nullptr, mine); });
    }
};

}  // namespace
