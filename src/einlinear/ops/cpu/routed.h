// Products with one of several matrices for every token: the experts of a mixture.
//
// Tokens come in blocks, and a block belongs to one thread: it goes through the experts, multiplies those tokens of the
// block that chose an expert in tiles, and adds to their rows of the output. However uneven the load, the threads have
// the same to do, no two of them write to the same row, and nothing is stored for every pair.
#pragma once

#include <algorithm>
#include <vector>

#include "passes.h"

namespace {

// A pair is a token and one of its experts: pair i is of token i / active, whose input meets gates[i] on its way in.
// `order` has the pairs sorted by block, then by expert; `first` says where those of (block, expert) begin.
template <class S>
struct Pairs {
    const Index *first, *order;
    const S* gates;
    Index tokens, block, experts, active;  // block: tokens of one, but for the last

    Index blocks() const { return (tokens + block - 1) / block; }
    Index first_token(Index b) const { return std::min(tokens, b * block); }
    Index count(Index b, Index expert) const { return at(b, expert + 1) - at(b, expert); }
    Index at(Index b, Index expert) const { return first[b * experts + expert]; }
};

// The pairs of a tile, and where their rows are.
template <class S>
struct PairTile {
    std::vector<const S*> inputs;
    std::vector<S*> outputs;
    std::vector<S> gates;
    Index tile, count = 0;
    const Index* pairs = nullptr;

    explicit PairTile(Index tile) : inputs(tile), outputs(tile), gates(tile), tile(tile) {}
    void set(const Pairs<S>& all, Index from, Index to, const S* in, Index in_features, S* out, Index out_features) {
        pairs = all.order + from, count = std::min(tile, to - from);
        for (Index r = 0; r < count; r++) {
            Index token = pairs[r] / all.active;
            inputs[r] = in + token * in_features, outputs[r] = out + token * out_features;
            gates[r] = all.gates[pairs[r]];
        }
    }
    Index width() const {  // half a tile is enough for few
        constexpr Index L = Simd<S>::lanes;
        return count <= L ? L : tile;
    }
};

// The factors of an expert, which are stacked.
template <class S>
static std::vector<const S*> of_expert(const Program& p, const S* const* factors, Index expert) {
    std::vector<const S*> found;
    for (auto& term : p.terms)
        for (auto& s : term) {
            found.resize(std::max<size_t>(found.size(), s.factor + 1));
            found[s.factor] = factors[s.factor] + expert * s.entries();
        }
    return found;
}

constexpr Index PACKED = 64;  // pairs for which packing the factors pays

template <class S>
static void forward_routed(const Program& p, const S* const* factors, const Pairs<S>& pairs, const S* x, const S* bias,
                            S* y, int threads) {
    constexpr Index L = Simd<S>::lanes;
    Index tile = 2 * L, states = p.states();
    bool single = p.terms.size() == 1;
    bool stream_in = single && before(p.first()).run(), stream_out = single && after(p.last()).run();
    Index rows_in = stream_in ? 0 : p.width_in, rows_out = stream_out ? 0 : p.width_out;
    expect(y, pairs.tokens * p.out_features * sizeof(S));
    Team::run(threads, [&](Team all) {
        Team alone = Team::alone();
        Buffer<S> packed(p.factor_entries()), own((rows_in + rows_out + states) * tile), scratch(2 * p.widest * tile);
        S *xs = own.data, *ys = xs + rows_in * tile, *middle = ys + rows_out * tile;
        PairTile<S> t(tile);
        auto expert_in_block = [&](Index b, Index e) {
            auto w = all_weights(p, of_expert(p, factors, e).data(), packed.data, false, pairs.count(b, e) < PACKED,
                                 Share::whole());
            for (Index i = pairs.at(b, e); i < pairs.at(b, e + 1); i += tile) {
                t.set(pairs, i, pairs.at(b, e + 1), x, p.in_features, y, p.out_features);
                Source<S> source{nullptr, p.in_features, t.count, t.inputs.data(), t.gates.data()};
                Sink<S> sink{nullptr, p.out_features, t.count, t.outputs.data()};
                if (!stream_in) read_tile(source, xs, p.width_in, t.width(), Share::whole());
                run_forward(p, w, xs, middle, ys, stream_in ? &source : nullptr, stream_out ? &sink : nullptr,
                            (const S*)nullptr, scratch.data, t.width(), alone);
                if (!stream_out) write_tile(ys, t.width(), sink, (const S*)nullptr, Share::whole());
            }
        };
        all.phase([&](Share mine) {
            for (Index b = mine.first(pairs.blocks()); b < mine.last(pairs.blocks()); b++) {
                for (Index token = pairs.first_token(b); token < pairs.first_token(b + 1); token++) {
                    S* row = y + token * p.out_features;
                    bias ? (void)std::copy_n(bias, p.out_features, row) : (void)std::fill_n(row, p.out_features, S(0));
                }
                for (Index e = 0; e < pairs.experts; e++)
                    if (pairs.count(b, e)) expert_in_block(b, e);
            }
        });
    });
}

constexpr Index SUMS = 1 << 20;  // entries of the factors' gradients that a thread keeps at a time

// The gradients of x, of the gates and of the stacked factors, each where it is wanted. (dx and dgates together, or
// neither: both come from what goes back to a pair.) The threads go through the experts side by side, a few at a time,
// and add up what they found for these: for all experts at once it would take as much memory as the factors, each.
template <class S>
static void backward_routed(const Program& p, const S* const* factors, const Pairs<S>& pairs, const S* x, const S* dy,
                             S* dx, S* dgates, S* const* dfactors, int threads) {
    Index tile = 2 * Simd<S>::lanes, states = p.states(), width = p.in_features;
    FactorGradients gradients(p, tile, S());
    if (dx) expect(dx, pairs.tokens * width * sizeof(S));
    for (auto& term : p.terms)
        for (auto& s : term)
            if (dfactors[s.factor]) expect(dfactors[s.factor], pairs.experts * s.entries() * sizeof(S));
    bool single = p.terms.size() == 1 && p.terms[0].size() > 1;
    bool stream_in = single && before(p.first()).run(), stream_out = single && after(p.last()).run();
    Index rows_in = stream_in ? 0 : p.width_in, rows_out = stream_out ? 0 : p.width_out;
    Index few = std::min(pairs.experts, std::max<Index>(1, SUMS / gradients.entries));  // experts at a time
    std::vector<Buffer<S>> sums;
    std::vector<std::vector<char>> met(threads, std::vector<char>(few));  // whether a thread has a sum for an expert
    for (int i = 0; i < threads; i++) sums.emplace_back(few * gradients.entries);
    Team::run(threads, [&](Team all) {
        Team alone = Team::alone();
        Buffer<S> packed(p.factor_entries()), packed_forward(states ? p.factor_entries() : 0);
        Buffer<S> own((rows_out + rows_in + states + 2 * p.widest) * tile), scratch(2 * p.widest * tile);
        Buffer<S> panels(gradients.panel), inputs(tile * width), outputs(tile * p.out_features), found(tile * width);
        S *dys = own.data, *dxs = dys + rows_out * tile, *turn = dxs + rows_in * tile;
        S* recomputed = turn + 2 * p.widest * tile;
        PairTile<S> t(tile);
        std::vector<Weights<S>> w, w_back;
        BackwardTile<S> steps{p,          gradients, w_back, dfactors, dx != nullptr, stream_in,
                              stream_out, tile,      dys,    dxs,      {turn, turn + p.widest * tile},
                              panels.data, scratch.data};

        auto tile_back = [&](S* sum, bool add) {
            for (Index r = 0; r < t.count; r++) {
                const S* from = t.inputs[r];
                S *to = inputs.data + r * width, gate = t.gates[r];
                for (Index k = 0; k < width; k++) to[k] = gate * from[k];
                const S* grad = dy + t.pairs[r] / pairs.active * p.out_features;
                std::copy_n(grad, p.out_features, outputs.data + r * p.out_features);
            }
            steps.tile = t.width();
            Source<S> input{inputs.data, width, t.count}, output{outputs.data, p.out_features, t.count};
            Sink<S> sink{found.data, width, t.count};
            if (states) {  // the input's state lies where its gradient will be
                if (!stream_in) read_tile(input, dxs, p.width_in, steps.tile, Share::whole());
                run_forward(p, w, dxs, recomputed, (S*)nullptr, stream_in ? &input : nullptr, (const Sink<S>*)nullptr,
                            (const S*)nullptr, scratch.data, steps.tile, alone);
            }
            if (!stream_out) read_tile(output, dys, p.width_out, steps.tile, Share::whole());
            steps.run(input, output, recomputed, sink, sum, add, alone);
            if (!dx) return;
            if (!stream_in) write_tile(dxs, steps.tile, sink, (const S*)nullptr, Share::whole());
            for (Index r = 0; r < t.count; r++) {
                const S *back = found.data + r * width, *from = t.inputs[r];
                S *to = t.outputs[r], gate = t.gates[r];
                for (Index k = 0; k < width; k++) to[k] += gate * back[k];
                dgates[t.pairs[r]] = dot(back, from, width);
            }
        };

        // The experts from `expert` to before `last`, for the blocks of this thread, into its own sums.
        auto experts_back = [&](Index expert, Index last, Index begin, Index end) {
            std::fill_n(met[all.rank()].begin(), few, 0);
            for (Index b = begin; b < end; b++)
                for (Index e = expert; e < last; e++) {
                    if (!pairs.count(b, e)) continue;
                    auto of = of_expert(p, factors, e);
                    bool small = pairs.count(b, e) < PACKED;
                    w_back = all_weights(p, of.data(), packed.data, true, small, Share::whole());
                    if (states) w = all_weights(p, of.data(), packed_forward.data, false, small, Share::whole());
                    S* sum = sums[all.rank()].data + (e - expert) * gradients.entries;
                    for (Index i = pairs.at(b, e); i < pairs.at(b, e + 1); i += tile) {
                        t.set(pairs, i, pairs.at(b, e + 1), x, width, dx, width);
                        tile_back(sum, met[all.rank()][e - expert]);
                        met[all.rank()][e - expert] = 1;
                    }
                }
        };

        for (Index expert = 0; expert < pairs.experts; expert += few) {
            Index last = std::min(pairs.experts, expert + few);
            all.phase([&](Share mine) {
                Index begin = mine.first(pairs.blocks()), end = mine.last(pairs.blocks());
                if (dx && expert == 0)
                    std::fill(dx + pairs.first_token(begin) * width, dx + pairs.first_token(end) * width, S(0));
                experts_back(expert, last, begin, end);
            });
            all.phase([&](Share mine) {
                for (Index e = expert + mine.first(last - expert); e < expert + mine.last(last - expert); e++) {
                    std::vector<S*> parts;
                    for (int i = 0; i < all.size(); i++)  // fewer threads may run than were asked for
                        if (met[i][e - expert]) parts.push_back(sums[i].data + (e - expert) * gradients.entries);
                    write_factor_gradients(p, gradients, parts, dfactors, e, Share::whole());
                }
            });
        }
    });
}

}  // namespace
