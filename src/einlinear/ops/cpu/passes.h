// A tile through all steps: forward, and back with the gradients of factors.
#pragma once

#include <algorithm>
#include <vector>

#include "steps.h"

namespace {

// A factor for its step, or for the step back. It is packed into `room`, which is moved past it; with few tokens that
// would not pay, so a factor with constant strides is read as it lies in memory.
template <class S>
static Weights<S> weights(const Step& s, const S* factor, S*& room, bool backward, bool small, Share mine) {
    if (small && s.w_new_stride && s.w_contracted_stride)
        return backward ? Weights<S>{factor, s.w_batch, 0, s.w_new_stride, s.w_contracted_stride}
                        : Weights<S>{factor, s.w_batch, 0, s.w_contracted_stride, s.w_new_stride};
    S* to = room;
    room += s.entries();
    pack(s, factor, to, backward, mine);
    return {to, nullptr, s.new_size * s.contracted_size, 0, 0};
}

// All factors as their steps multiply with them, in order; a thread packs its share of them.
template <class S>
static std::vector<Weights<S>> all_weights(const Program& p, const S* const* factors, S* packed, bool backward,
                                           bool small, Share mine) {
    std::vector<Weights<S>> result;
    for (auto& term : p.terms)
        for (auto& s : term) result.push_back(weights(s, factors[s.factor], packed, backward, small, mine));
    return result;
}

// Both ends of a tile. Where the first step can read token-major memory itself, and the last one write it, they need no
// rows in the tile: with several terms these steps would read it again, or add to it.
struct Ends {
    bool stream_in, stream_out;
    Index rows_in, rows_out;

    Ends(const Program& p, bool single)
        : stream_in(single && input_of(p.first()).run()),
          stream_out(single && output_of(p.last()).run()),
          rows_in(stream_in ? 0 : p.width_in),
          rows_out(stream_out ? 0 : p.width_out) {}
    static Ends forward(const Program& p) { return {p, p.terms.size() == 1}; }
    // With a single step, its gradients need the rows.
    static Ends backward(const Program& p) { return {p, p.terms.size() == 1 && p.terms[0].size() > 1}; }
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

    // Intermediates are written one after the other; without a sink, they are all that is computed.
    void run(const Source<S>& source, S* intermediates, const Sink<S>* sink, Team team) const {
        if (!ends.stream_in) team.phase([&](Share mine) { read_tile(source, xs, p.width_in, tile, mine); });
        size_t at = 0;
        for (auto& term : p.terms) {
            const S* input = xs;
            for (auto& s : term) {
                bool begins = &s == &term.front(), last = &s == &term.back();
                const Weights<S>& matrices = w[at++];
                if (last && !sink) break;
                team.phase([&](Share mine) {
                    run_step(s, matrices, input_of(s), output_of(s), input, last ? ys : intermediates,
                             begins && ends.stream_in ? &source : nullptr, last && ends.stream_out ? sink : nullptr,
                             bias, scratch, tile, last && &term != &p.terms[0], mine);
                });
                input = intermediates;
                if (!last) intermediates += s.width_out * tile;
            }
        }
        if (sink && !ends.stream_out) team.phase([&](Share mine) { write_tile(ys, tile, *sink, bias, mine); });
    }
};

template <class S>
static Index round_up(Index count) {
    constexpr Index L = Simd<S>::lanes;
    return (count + L - 1) / L * L;
}

// The gradient of a factor is a sum over tokens of products of its step's input and of the gradient of its output. One
// of them is read feature-major, a token at a time; the other token-major, in vectors of features: `major`. At the ends
// of a term that is the input or the gradient of the output as they lie in memory.
struct FactorGradient {
    // whether the vectors are of contracted features, else of new ones
    bool by_contracted;
    Side vectors, other;
    // of the vectors, and rounded up to whole ones
    Index width, padded;

    template <class S>
    static FactorGradient of(const Step& s, bool begins, bool ends, S) {
        bool by_contracted = begins || !ends;
        Side in = input_of(s), out = output_of(s);
        FactorGradient g{by_contracted, by_contracted ? in : out, by_contracted ? out : in, 0, 0};
        g.width = g.vectors.features, g.padded = round_up<S>(g.width);
        return g;
    }
    // of one batch entry
    Index entries() const { return other.features * padded; }
};

// This tile's share into, or added to, `sum`, laid out (batch, other features, padded vectors).
template <class S>
static void add_factor_gradient(const Step& s, const FactorGradient& g, const Source<S>* major, const S* vectors_rows,
                                const S* other_rows, Index tokens, Index tile, S* panel_memory, S* sum, bool add,
                                Share mine) {
    std::vector<const S*> panels(s.free_size);
    bool whole = major && g.vectors.run() && g.width == g.padded;
    for (Index b = mine.first(s.batch_size); b < mine.last(s.batch_size); b++) {
        // Vectors that lie in token-major memory, none of them in the padding, are read there.
        bool direct = whole;
        for (Index c = 0; direct && c < s.free_size; c++) {
            Index at = g.vectors.batch[b] + g.vectors.free[c];
            direct = at + g.width <= major->features;
            panels[c] = major->data + at;
        }
        // Others are copied into panels, which are zero in the padding.
        for (Index c = 0; !direct && c < s.free_size; c++) {
            Index at = g.vectors.batch[b] + g.vectors.free[c];
            S* panel = panel_memory + c * tile * g.padded;
            panels[c] = panel;
            for (Index t = 0; t < tokens; t++)
                for (Index k = 0; k < g.padded; k++) {
                    Index feature = k < g.width ? at + g.vectors.feature[k] : -1;
                    S value = 0;
                    if (feature >= 0 && !major)
                        value = vectors_rows[feature * tile + t];
                    else if (feature >= 0 && feature < major->features)
                        value = major->data[t * major->features + feature];
                    panel[t * g.padded + k] = value;
                }
        }
        accumulate_rows<S, MICRO_ROWS>(other_rows + g.other.batch[b] * tile, g.other.feature, g.other.features,
                                       g.other.free, s.free_size, tile, panels.data(),
                                       direct ? major->features : g.padded, g.padded, tokens, sum + b * g.entries(),
                                       add);
    }
}

// The sums of the threads -> the factor's own layout.
template <class S>
static void write_factor_gradient(const Step& s, const FactorGradient& g, const std::vector<S*>& sums, Index offset,
                                  S* to, Share mine) {
    bool transposed = !g.by_contracted && s.w_new_stride && s.w_contracted_stride == 1;
    for (Index b = mine.first(s.batch_size); b < mine.last(s.batch_size); b++) {
        S* total = sums[0] + offset + b * g.entries();
        for (size_t c = 1; c < sums.size(); c++) {
            const S* more = sums[c] + offset + b * g.entries();
            for (Index e = 0; e < g.entries(); e++) total[e] += more[e];
        }
        S* into = to + s.w_batch[b];
        if (transposed)
            transpose(total, g.padded, into, s.w_new_stride, s.contracted_size, s.new_size);
        else
            for (Index r = 0; r < s.new_size; r++)
                for (Index k = 0; k < s.contracted_size; k++)
                    into[s.w_new[r] + s.w_contracted[k]] = total[g.by_contracted ? r * g.padded + k : k * g.padded + r];
    }
}

// Those of all factors, and what they take.
struct FactorGradients {
    std::vector<std::vector<FactorGradient>> of;  // by term and step
    Index panel = 0, entries = 0;

    template <class S>
    FactorGradients(const Program& p, Index tile, S) {
        for (auto& term : p.terms) {
            of.emplace_back();
            for (auto& s : term) {
                auto g = FactorGradient::of(s, &s == &term.front(), &s == &term.back(), S());
                of.back().push_back(g);
                panel = std::max(panel, s.free_size * g.padded * tile);
                entries += s.batch_size * g.entries();
            }
        }
    }
};

// The sums of the threads -> all factors' gradients, or those of one of several stacked matrices; zero without sums.
template <class S>
static void write_factor_gradients(const Program& p, const FactorGradients& gradients, const std::vector<S*>& sums,
                                   S* const* dfactors, Index matrix, Share mine) {
    Index offset = 0;
    for (size_t j = 0; j < p.terms.size(); j++)
        for (size_t k = 0; k < p.terms[j].size(); k++) {
            const Step& s = p.terms[j][k];
            const FactorGradient& g = gradients.of[j][k];
            S* to = dfactors[s.factor];
            if (to && sums.empty()) std::fill_n(to + matrix * s.entries(), s.entries(), S(0));
            if (to && !sums.empty()) write_factor_gradient(s, g, sums, offset, to + matrix * s.entries(), mine);
            offset += s.batch_size * g.entries();
        }
}

// A tile back through all steps: its share of the factors' gradients, and the gradient of the input.
template <class S>
struct BackwardTile {
    const Program& p;
    const Ends& ends;
    const FactorGradients& gradients;
    const std::vector<Weights<S>>&w, &w_back;
    // null for those that are not wanted
    S* const* dfactors;
    bool recompute, wants_x;
    Index tile;
    S *panels, *scratch;
    S *dys = nullptr, *dxs = nullptr, *turns[2] = {}, *recomputed = nullptr;

    // Memory of its own: the ends, two gradients between steps in turn, and intermediates that are recomputed.
    static Index room(const Program& p, const Ends& ends, bool recompute, Index tile) {
        return (ends.rows_out + ends.rows_in + 2 * p.widest + (recompute ? p.intermediates() : 0)) * tile;
    }
    void place(S* memory) {
        dys = memory, dxs = dys + ends.rows_out * tile;
        turns[0] = dxs + ends.rows_in * tile, turns[1] = turns[0] + p.widest * tile;
        recomputed = turns[1] + p.widest * tile;
    }

    // Gradients of factors go into `sum`, or are added to it; that of the input goes to `sink`.
    void run(const Source<S>& input, const Source<S>& output, const S* saved, const Sink<S>& sink, S* sum, bool add,
             Team team) const {
        // The input lies where its gradient will be.
        if (recompute) {
            ForwardTile<S> forward{p, ends, w, nullptr, tile, dxs, nullptr, scratch};
            forward.run(input, recomputed, nullptr, team);
        }
        if (!ends.stream_out) team.phase([&](Share mine) { read_tile(output, dys, p.width_out, tile, mine); });
        const S* intermediates = saved ? saved : recomputed;
        Index offset = gradients.entries, back = w_back.size();
        for (auto& term : p.terms) intermediates += intermediate_rows(term) * tile;
        // terms and steps from the last to the first
        for (size_t j = p.terms.size(); j-- > 0;) {
            auto& term = p.terms[j];
            const S* g = dys;
            for (size_t k = term.size(); k-- > 0;) {
                const Step& s = term[k];
                const FactorGradient& gradient = gradients.of[j][k];
                bool begins = k == 0, last = k + 1 == term.size();
                if (!begins) intermediates -= s.width_in * tile;
                offset -= s.batch_size * gradient.entries(), back--;
                const Source<S>* major = begins ? &input : (last ? &output : nullptr);
                S* to = begins ? dxs : turns[k % 2];
                team.phase([&](Share mine) {
                    if (dfactors[s.factor])
                        add_factor_gradient(s, gradient, major, intermediates,
                                            gradient.by_contracted ? g : intermediates, input.tokens, tile, panels,
                                            sum + offset, add, mine);
                    if (begins && !wants_x) return;
                    run_step(s, w_back[back], output_of(s), input_of(s), g, to,
                             last && ends.stream_out ? &output : nullptr, begins && ends.stream_in ? &sink : nullptr,
                             (const S*)nullptr, scratch, tile, begins && j + 1 < p.terms.size(), mine);
                });
                g = to;
            }
        }
        if (wants_x && !ends.stream_in)
            team.phase([&](Share mine) { write_tile(dxs, tile, sink, (const S*)nullptr, mine); });
    }
};

}  // namespace
