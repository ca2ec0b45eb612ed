// Routed products: every token is multiplied with the matrices of its experts.
//
// Tokens come in blocks, and a block belongs to one thread: it goes through the experts, multiplies the tokens of the
// block that are routed to an expert in tiles, and adds to their rows of the output. However uneven the load, the
// threads have the same work, no two of them write to the same row, and nothing is stored for every pair.
#pragma once

#include <algorithm>
#include <vector>

#include "tiles.h"

namespace {

// A pair is a token and one of its experts: pair i is of token i / active, whose input is multiplied by gates[i].
// `order` has the pairs sorted by block, then by expert; `first` says where those of (block, expert) begin.
template <class T>
struct Pairs {
    const Index *first, *order;
    const T* gates;
    // block: tokens of a block; the last may have fewer
    Index tokens, block, experts, active;

    Index blocks() const { return (tokens + block - 1) / block; }
    Index first_token(Index b) const { return std::min(tokens, b * block); }
    Index count(Index b, Index expert) const { return at(b, expert + 1) - at(b, expert); }
    Index at(Index b, Index expert) const { return first[b * experts + expert]; }
};

// The pairs of a tile, and where their rows are.
template <class T>
struct PairTile {
    using S = Arithmetic<T>;
    std::vector<const T*> inputs;
    std::vector<S*> outputs;
    std::vector<S> gates;
    Index tile, count = 0;
    const Index* pairs = nullptr;

    explicit PairTile(Index tile) : inputs(tile), outputs(tile), gates(tile), tile(tile) {}
    // `out` has the rows of the tokens from `origin` on
    void set(const Pairs<T>& all, Index from, Index to, const T* in, Index in_features, S* out, Index origin,
             Index out_features) {
        pairs = all.order + from, count = std::min(tile, to - from);
        for (Index r = 0; r < count; r++) {
            Index token = pairs[r] / all.active;
            inputs[r] = in + token * in_features, outputs[r] = out + (token - origin) * out_features;
            gates[r] = all.gates[pairs[r]];
        }
    }
    // half a tile is enough for few pairs
    Index width() const {
        constexpr Index L = Simd<S>::lanes;
        return count <= L ? L : tile;
    }
};

// pairs for which packing the factors pays
constexpr Index PACKED = 64;

// In half precision, the outputs of experts are added up in rows of their own, and rounded once.
template <class T>
static void forward_routed(const Program& p, const T* const* factors, const Pairs<T>& pairs, const T* x, const T* bias,
                           T* y, int threads) {
    using S = Arithmetic<T>;
    constexpr Index L = Simd<S>::lanes;
    Ends ends(p, false);
    Index tile = 2 * L, room = (ends.rows_in + ends.rows_out + p.intermediates) * tile;
    advise_huge_pages(y, pairs.tokens * p.out_features * sizeof(T));
    Widened<T> wide_bias(bias, p.out_features);
    Team::run(threads, [&](Team all) {
        Buffer<S> packed(p.factor_entries), own(room), scratch(2 * p.widest * tile);
        Buffer<S> added(widens<T> ? pairs.block * p.out_features : 0);
        S *xs = own.data, *ys = xs + ends.rows_in * tile, *intermediates = ys + ends.rows_out * tile;
        std::vector<Weights<S>> w;
        ForwardTile<S> steps{p, ends, w, nullptr, tile, xs, ys, scratch.data};
        PairTile<T> t(tile);
        auto expert_in_block = [&](Index b, Index e) {
            w = all_weights(p, factors, e, packed.data, false, pairs.count(b, e) < PACKED, Share::whole());
            for (Index i = pairs.at(b, e); i < pairs.at(b, e + 1); i += tile) {
                t.set(pairs, i, pairs.at(b, e + 1), x, p.in_features, widens<T> ? added.data : (S*)y,
                      widens<T> ? pairs.first_token(b) : 0, p.out_features);
                Source<T> source{nullptr, p.in_features, t.count, t.inputs.data(), t.gates.data()};
                Sink<S> sink{nullptr, p.out_features, t.count, t.outputs.data()};
                steps.tile = t.width();
                steps.run(&source, intermediates, &sink, true, Team::alone());
            }
        };
        all.phase([&](Share mine) {
            for (Index b = mine.first(pairs.blocks()); b < mine.last(pairs.blocks()); b++) {
                // Experts add to the rows of their tokens, so these begin with the bias.
                const Index first = pairs.first_token(b), tokens = pairs.first_token(b + 1) - first;
                T* to = y + first * p.out_features;
                S* row = widens<T> ? added.data : (S*)to;
                for (Index i = 0; i < tokens; i++, row += p.out_features)
                    bias ? (void)std::copy_n(wide_bias.data, p.out_features, row)
                         : (void)std::fill_n(row, p.out_features, S(0));
                for (Index e = 0; e < pairs.experts; e++)
                    if (pairs.count(b, e)) expert_in_block(b, e);
                if (widens<T>) convert(added.data, to, 0, tokens * p.out_features);
            }
        });
    });
}

// entries of the factors' gradients that a thread keeps at a time
constexpr Index SUMS = 1 << 20;

// The gradients of x, of the gates and of the stacked factors, each where it is wanted. (dx and dgates together, or
// neither: both come from the gradient of an expert's input.) The threads go through the experts side by side, a few at
// a time, and add up their gradients of these: for all experts at once each thread would need as much memory as the
// factors.
template <class T>
static void backward_routed(const Program& p, const T* const* factors, const Pairs<T>& pairs, const T* x, const T* dy,
                            T* dx, T* dgates, T* const* dfactors, int threads) {
    using S = Arithmetic<T>;
    Index tile = 2 * Simd<S>::lanes, width = p.in_features;
    Ends ends(p, true);
    FactorGradients<S> gradients(p, tile);
    Buffer<S> added(widens<T> && dx ? pairs.tokens * width : 0);
    S* dx_rows = widens<T> && dx ? added.data : (S*)dx;
    if (dx) advise_huge_pages(dx_rows, pairs.tokens * width * sizeof(S));
    for (size_t k = 0; k < p.steps.size(); k++)
        if (dfactors[k]) advise_huge_pages(dfactors[k], pairs.experts * p.steps[k].entries() * sizeof(T));
    bool recompute = p.intermediates;
    // experts at a time
    Index few = std::min(pairs.experts, std::max<Index>(1, SUMS / gradients.entries));
    std::vector<Buffer<S>> sums;
    // whether a thread has a sum for an expert
    std::vector<std::vector<char>> has_sum(threads, std::vector<char>(few));
    for (int i = 0; i < threads; i++) sums.emplace_back(few * gradients.entries);
    Team::run(threads, [&](Team all) {
        Buffer<S> packed(p.factor_entries), packed_forward(recompute ? p.factor_entries : 0);
        Buffer<S> own(BackwardTile<S>::room(p, ends, recompute, tile)), scratch(2 * p.widest * tile);
        Buffer<S> panels(gradients.panel), inputs(tile * width), outputs(tile * p.out_features), dinputs(tile * width);
        PairTile<T> t(tile);
        std::vector<Weights<S>> w, w_back;
        BackwardTile<S> steps{p,         ends,          gradients, w,        w_back,      wanted_of(p, dfactors),
                              recompute, dx != nullptr, tile};
        steps.set_memory(own.data), steps.panels = panels.data, steps.scratch = scratch.data;

        auto tile_back = [&](S* sum, bool add) {
            // Gradients of factors read token-major memory, so scaled inputs and output gradients are copied together.
            for (Index r = 0; r < t.count; r++) {
                S *to = inputs.data + r * width, gate = t.gates[r];
                convert(t.inputs[r], to, 0, width);
                for (Index k = 0; k < width; k++) to[k] *= gate;
                const T* grad = dy + t.pairs[r] / pairs.active * p.out_features;
                convert(grad, outputs.data + r * p.out_features, 0, p.out_features);
            }
            steps.tile = t.width();
            Source<S> input{inputs.data, width, t.count}, output{outputs.data, p.out_features, t.count};
            Sink<S> dinput_sink{dinputs.data, width, t.count};
            steps.run(&input, nullptr, &output, nullptr, &dinput_sink, sum, add, t.count, Team::alone());
            if (!dx) return;
            for (Index r = 0; r < t.count; r++) {
                const S* dinput = dinputs.data + r * width;
                S *to = t.outputs[r], gate = t.gates[r];
                for (Index k = 0; k < width; k++) to[k] += gate * dinput[k];
                dgates[t.pairs[r]] = dot(dinput, t.inputs[r], width);
            }
        };

        // The experts from `expert` to before `last`, for the blocks of this thread, into its own sums.
        auto experts_back = [&](Index expert, Index last, Index begin, Index end) {
            auto& has = has_sum[all.rank()];
            std::fill_n(has.begin(), few, 0);
            for (Index b = begin; b < end; b++)
                for (Index e = expert; e < last; e++) {
                    if (!pairs.count(b, e)) continue;
                    bool small = pairs.count(b, e) < PACKED;
                    w_back = all_weights(p, factors, e, packed.data, true, small, Share::whole());
                    if (recompute) w = all_weights(p, factors, e, packed_forward.data, false, small, Share::whole());
                    S* sum = sums[all.rank()].data + (e - expert) * gradients.entries;
                    for (Index i = pairs.at(b, e); i < pairs.at(b, e + 1); i += tile) {
                        t.set(pairs, i, pairs.at(b, e + 1), x, width, dx_rows, 0, width);
                        tile_back(sum, has[e - expert]);
                        has[e - expert] = 1;
                    }
                }
        };

        for (Index expert = 0; expert < pairs.experts; expert += few) {
            Index last = std::min(pairs.experts, expert + few);
            all.phase([&](Share mine) {
                Index begin = mine.first(pairs.blocks()), end = mine.last(pairs.blocks());
                Index dx_begin = pairs.first_token(begin) * width, dx_end = pairs.first_token(end) * width;
                if (dx && expert == 0) std::fill(dx_rows + dx_begin, dx_rows + dx_end, S(0));
                experts_back(expert, last, begin, end);
                if (widens<T> && dx && last == pairs.experts) convert(dx_rows, dx, dx_begin, dx_end);
            });
            all.phase([&](Share mine) {
                for (Index e = expert + mine.first(last - expert); e < expert + mine.last(last - expert); e++) {
                    // fewer threads may run than were asked for
                    std::vector<S*> parts;
                    for (int i = 0; i < all.size(); i++)
                        if (has_sum[i][e - expert]) parts.push_back(sums[i].data + (e - expert) * gradients.entries);
                    write_factor_gradients(p, gradients, parts, dfactors, e, Share::whole());
                }
            });
        }
    });
}

}  // namespace
