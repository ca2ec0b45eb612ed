// A tile through all steps, forward and back.
#pragma once

#include <algorithm>
#include <vector>

#include "steps.h"

namespace {

// A factor for its step, or for the step back; packed into `room`, of which what is left is returned in it.
template <class S>
static Weights<S> weights(const Step& s, const S* factor, S*& room, bool backward, bool small, Share mine) {
    if (small && s.w_row && s.w_inner)
        return backward ? Weights<S>{factor, s.w_b, 0, s.w_row, s.w_inner}
                        : Weights<S>{factor, s.w_b, 0, s.w_inner, s.w_row};
    S* to = room;
    room += s.entries();
    pack(s, factor, to, backward, mine);
    return {to, nullptr, s.rows * s.inner, 0, 0};
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

// The states after every step but each term's last, into `middle`, one after the other; the last ones into `sink`, or
// added up in `to`; neither where only the intermediate states are wanted.
template <class S>
static void run_forward(const Program& p, const std::vector<Weights<S>>& w, const S* from, S* middle, S* to,
                        const Source<S>* source, const Sink<S>* sink, const S* bias, S* scratch, Index tile,
                        Team team) {
    size_t at = 0;
    for (auto& term : p.terms) {
        const S* state = from;
        for (auto& s : term) {
            bool begins = &s == &term.front(), ends = &s == &term.back();
            const Weights<S>& matrices = w[at++];
            if (ends && !to && !sink) break;
            team.phase([&](Share mine) {
                run_step(s, matrices, before(s), after(s), state, ends ? to : middle, begins ? source : nullptr,
                         ends ? sink : nullptr, bias, scratch, tile, ends && &term != &p.terms[0], mine);
            });
            state = middle;
            if (!ends) middle += s.width_out * tile;
        }
    }
}

template <class S>
static Index round_up(Index count) {
    constexpr Index L = Simd<S>::lanes;
    return (count + L - 1) / L * L;
}

// The gradient of a factor is a sum over tokens of products of the state before its step and the gradient of the state
// after it. One of them is read feature-major, a token at a time; the other token-major, in vectors of features:
// `major`. At the ends of a term that is the input or the gradient of the output as they lie in memory.
struct FactorGradient {
    bool by_inner;  // whether the vectors are of the inner features, else of the rows
    Side vectors, other;
    Index width, padded;  // of the vectors, and rounded up to whole ones

    template <class S>
    static FactorGradient of(const Step& s, bool begins, bool ends, S) {
        bool by_inner = begins || !ends;
        FactorGradient g{by_inner, by_inner ? before(s) : after(s), by_inner ? after(s) : before(s), 0, 0};
        g.width = g.vectors.rows, g.padded = round_up<S>(g.width);
        return g;
    }
    Index entries() const { return other.rows * padded; }  // of one batch entry
};

// This tile's share into, or added to, `sum`, laid out (batch, other rows, padded vectors).
template <class S>
static void add_factor_gradient(const Step& s, const FactorGradient& g, const Source<S>* major, const S* vectors_state,
                                const S* other_state, Index tokens, Index tile, S* panel_memory, S* sum, bool add,
                                Share mine) {
    std::vector<const S*> panels(s.columns);
    bool whole = major && g.vectors.run() && g.width == g.padded;
    for (Index b = mine.first(s.batches); b < mine.last(s.batches); b++) {
        bool direct = whole;
        for (Index c = 0; direct && c < s.columns; c++) {
            Index at = g.vectors.batch[b] + g.vectors.column[c];
            direct = at + g.width <= major->features;
            panels[c] = major->data + at;
        }
        for (Index c = 0; !direct && c < s.columns; c++) {
            Index at = g.vectors.batch[b] + g.vectors.column[c];
            S* panel = panel_memory + c * tile * g.padded;
            panels[c] = panel;
            for (Index t = 0; t < tokens; t++)
                for (Index k = 0; k < g.padded; k++) {
                    Index feature = k < g.width ? at + g.vectors.row[k] : -1;
                    S value = 0;
                    if (feature >= 0 && !major)
                        value = vectors_state[feature * tile + t];
                    else if (feature >= 0 && feature < major->features)
                        value = major->data[t * major->features + feature];
                    panel[t * g.padded + k] = value;
                }
        }
        accumulate_rows<S, MICRO_ROWS>(other_state + g.other.batch[b] * tile, g.other.row, g.other.rows, g.other.column,
                                       s.columns, tile, panels.data(), direct ? major->features : g.padded, g.padded,
                                       tokens, sum + b * g.entries(), add);
    }
}

// The sums of the threads -> the factor's own layout.
template <class S>
static void write_factor_gradient(const Step& s, const FactorGradient& g, const std::vector<S*>& sums, Index offset,
                                  S* to, Share mine) {
    bool transposed = !g.by_inner && s.w_row && s.w_inner == 1;
    for (Index b = mine.first(s.batches); b < mine.last(s.batches); b++) {
        S* total = sums[0] + offset + b * g.entries();
        for (size_t c = 1; c < sums.size(); c++) {
            const S* more = sums[c] + offset + b * g.entries();
            for (Index e = 0; e < g.entries(); e++) total[e] += more[e];
        }
        S* into = to + s.w_b[b];
        if (transposed)
            transpose(total, g.padded, into, s.w_row, s.inner, s.rows);
        else
            for (Index r = 0; r < s.rows; r++)
                for (Index k = 0; k < s.inner; k++)
                    into[s.w_r[r] + s.w_k[k]] = total[g.by_inner ? r * g.padded + k : k * g.padded + r];
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
                panel = std::max(panel, s.columns * g.padded * tile);
                entries += s.batches * g.entries();
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
            offset += s.batches * g.entries();
        }
}

// A tile back through all steps: its share of the factors' gradients into `sum`, the input's into `sink` or `dxs`.
// `middle` are the intermediate states, `dys` is the gradient of the output where it is not read from `output`.
template <class S>
struct BackwardTile {
    const Program& p;
    const FactorGradients& gradients;
    const std::vector<Weights<S>>& w_back;
    S* const* dfactors;  // null for those that are not wanted
    bool wants_x, stream_in, stream_out;
    Index tile;
    S *dys, *dxs, *turns[2], *panels, *scratch;

    void run(const Source<S>& input, const Source<S>& output, const S* middle, const Sink<S>& sink, S* sum, bool add,
             Team team) const {
        Index offset = gradients.entries, back = w_back.size();
        for (auto& term : p.terms) middle += term_states(term) * tile;
        for (size_t j = p.terms.size(); j-- > 0;) {  // terms and steps from the last to the first
            auto& term = p.terms[j];
            const S* g = dys;
            for (size_t k = term.size(); k-- > 0;) {
                const Step& s = term[k];
                const FactorGradient& gradient = gradients.of[j][k];
                bool begins = k == 0, ends = k + 1 == term.size();
                if (!begins) middle -= s.width_in * tile;
                offset -= s.batches * gradient.entries(), back--;
                const Source<S>* major = begins ? &input : (ends ? &output : nullptr);
                S* to = begins ? dxs : turns[k % 2];
                team.phase([&](Share mine) {
                    if (dfactors[s.factor])
                        add_factor_gradient(s, gradient, major, middle, gradient.by_inner ? g : middle, input.tokens,
                                            tile, panels, sum + offset, add, mine);
                    if (begins && !wants_x) return;
                    run_step(s, w_back[back], after(s), before(s), g, to, ends && stream_out ? &output : nullptr,
                             begins && stream_in ? &sink : nullptr, (const S*)nullptr, scratch, tile,
                             begins && j + 1 < p.terms.size(), mine);
                });
                g = to;
            }
        }
    }
};

}  // namespace
