// Structured products on the CPU, in tiles of tokens that stay in cache.
//
// A tile holds a state feature-major: one row of `tile` tokens per feature. Then every contraction step, whatever its
// axes, is the same small matrix product on rows found by offset tables, and permuting axes costs nothing: it only
// changes the tables. Transposition happens where a tile is read from and written to token-major memory.
//
// vectors.h     vectors of the machine at hand, memory
// program.h     the structure, as numbers
// transpose.h   between token-major and feature-major
// multiply.h    the small matrix products
// steps.h       a step of a tile, by one thread or several
// few.h         fewer tokens than make a tile
//
// Here: forward, backward, and the functions that Python calls.
#include <algorithm>
#include <vector>

#include "few.h"
#include "steps.h"

namespace {

// Two vectors, so that the micro-kernels have enough to do; more where factors are read from memory for every tile.
template <class S>
static Index tile_of(const Program& p, Index tokens) {
    constexpr Index L = Simd<S>::lanes;
    return tokens <= L ? L : p.heavy() && tokens >= 8 * L ? 8 * L : 2 * L;
}
template <class S>
static Index round_up(Index count) {
    constexpr Index L = Simd<S>::lanes;
    return (count + L - 1) / L * L;
}

// How a call is divided: its tiles among the threads or, where there are fewer tiles than threads, every tile's
// products.
template <class S>
struct Division {
    Index tile, tiles;
    bool shared, small;  // small: so few tokens that packing the factors would not pay

    Division(const Program& p, Index n, int threads) : tile(tile_of<S>(p, n)), tiles((n + tile - 1) / tile) {
        shared = tiles < threads, small = tiles < 4;
    }
    Team team(Team all) const { return shared ? all : Team{0, 1}; }
    Index first(Team all) const { return shared ? 0 : all.first(tiles); }
    Index last(Team all) const { return shared ? tiles : all.last(tiles); }
};

// A factor for its step, or for the step back; packed into `room`, of which what is left is returned in it.
template <class S>
static Weights<S> weights(const Step& s, const S* factor, S*& room, bool backward, bool small, Team team) {
    if (small && s.w_row && s.w_inner)
        return backward ? Weights<S>{factor, s.w_b, 0, s.w_row, s.w_inner}
                        : Weights<S>{factor, s.w_b, 0, s.w_inner, s.w_row};
    S* to = room;
    room += s.batches * s.rows * s.inner;
    pack(s, factor, to, backward, team);
    return {to, nullptr, s.rows * s.inner, 0, 0};
}

// All factors as their steps multiply with them, in order.
template <class S>
static std::vector<Weights<S>> all_weights(const Program& p, const S* const* factors, S* packed, bool backward,
                                           bool small, Team all) {
    std::vector<Weights<S>> result;
    for (auto& term : p.terms)
        for (auto& s : term) result.push_back(weights(s, factors[s.factor], packed, backward, small, all));
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
            run_step(s, matrices, before(s), after(s), state, ends ? to : middle, begins ? source : nullptr,
                     ends ? sink : nullptr, bias, scratch, tile, ends && &term != &p.terms[0], team);
            state = middle;
            if (!ends) middle += s.width_out * tile;
        }
    }
}

template <class S>
static void forward(const Program& p, const S* const* factors, const S* x, const S* bias, S* y, S* saved, Index n,
                    int threads) {
    if (!saved && few(p, n, Simd<S>::lanes)) return forward_few(p, factors, x, bias, y, n, threads);
    Division<S> division(p, n, threads);
    Index tile = division.tile, states = p.states();
    expect(y, n * p.out_features * sizeof(S));
    if (saved) expect(saved, division.tiles * tile * states * sizeof(S));
    bool single = p.terms.size() == 1;
    bool stream_in = single && before(p.first()).run(), stream_out = single && after(p.last()).run();
    Index rows_in = stream_in ? 0 : p.width_in, rows_out = stream_out ? 0 : p.width_out;
    Index room = (rows_in + rows_out + (saved ? 0 : states)) * tile;
    Buffer<S> packed(p.factor_entries()), common(division.shared ? room : 0);
#pragma omp parallel num_threads(threads)
    {
        Team all = everyone(), team = division.team(all);
        auto w = all_weights(p, factors, packed.data, false, division.small, all);
        Buffer<S> own(division.shared ? 0 : room), scratch(2 * p.widest * tile);
        S* xs = division.shared ? common.data : own.data;
        S *ys = xs + rows_in * tile, *states_memory = ys + rows_out * tile;
        all.barrier();  // the factors are packed by all
        for (Index i = division.first(all); i < division.last(all); i++) {
            Index tokens = std::min(tile, n - i * tile);
            Source<S> source{x + i * tile * p.in_features, p.in_features, tokens};
            Sink<S> sink{y + i * tile * p.out_features, p.out_features, tokens};
            if (!stream_in) read_tile(source, xs, p.width_in, tile, team);
            run_forward(p, w, xs, saved ? saved + i * states * tile : states_memory, ys, stream_in ? &source : nullptr,
                        stream_out ? &sink : nullptr, bias, scratch.data, tile, team);
            if (!stream_out) write_tile(ys, tile, sink, bias, team);
        }
    }
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
                                Team team) {
    std::vector<const S*> panels(s.columns);
    bool whole = major && g.vectors.run() && g.width == g.padded;
    for (Index b = team.first(s.batches); b < team.last(s.batches); b++) {
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
                                  S* to, Team all) {
    bool transposed = !g.by_inner && s.w_row && s.w_inner == 1;
    for (Index b = all.first(s.batches); b < all.last(s.batches); b++) {
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
                if (dfactors[s.factor])
                    add_factor_gradient(s, gradient, major, middle, gradient.by_inner ? g : middle, input.tokens, tile,
                                        panels, sum + offset, add, team);
                if (begins && !wants_x) continue;
                S* to = begins ? dxs : turns[k % 2];
                run_step(s, w_back[back], after(s), before(s), g, to, ends && stream_out ? &output : nullptr,
                         begins && stream_in ? &sink : nullptr, (const S*)nullptr, scratch, tile,
                         begins && j + 1 < p.terms.size(), team);
                g = to;
            }
        }
    }
};

template <class S>
static void backward(const Program& p, const S* const* factors, const S* x, const S* dy, const S* saved, S* dx,
                     S* const* dfactors, Index n, int threads) {
    Division<S> division(p, n, threads);
    Index tile = division.tile, states = p.states();
    if (dx) expect(dx, n * p.in_features * sizeof(S));
    FactorGradients gradients(p, tile, S());
    bool recompute = !saved && states, single = p.terms.size() == 1 && p.terms[0].size() > 1;
    bool stream_in = single && before(p.first()).run(), stream_out = single && after(p.last()).run();
    Index rows_in = stream_in ? 0 : p.width_in, rows_out = stream_out ? 0 : p.width_out;
    Index room = (rows_out + rows_in + (recompute ? states : 0) + 2 * p.widest) * tile;
    Buffer<S> packed(p.factor_entries()), packed_forward(recompute ? p.factor_entries() : 0);
    Buffer<S> common(division.shared ? room : 0);
    std::vector<Buffer<S>> sums;
    for (int i = 0; i < (division.shared ? 1 : threads); i++) sums.emplace_back(gradients.entries);
#pragma omp parallel num_threads(threads)
    {
        Team all = everyone(), team = division.team(all);
        auto w_back = all_weights(p, factors, packed.data, true, division.small, all);
        std::vector<Weights<S>> w;
        if (recompute) w = all_weights(p, factors, packed_forward.data, false, division.small, all);
        Buffer<S> own(division.shared ? 0 : room), panels(gradients.panel), scratch(2 * p.widest * tile);
        S* sum = sums[division.shared ? 0 : all.rank].data;
        S* dys = division.shared ? common.data : own.data;
        S *dxs = dys + rows_out * tile, *turn = dxs + rows_in * tile, *recomputed = turn + 2 * p.widest * tile;
        BackwardTile<S> steps{p,    gradients, w_back, dfactors,    dx != nullptr,
                              stream_in, stream_out, tile, dys, dxs, {turn, turn + p.widest * tile},
                              panels.data, scratch.data};
        all.barrier();
        for (Index i = division.first(all); i < division.last(all); i++) {
            Index tokens = std::min(tile, n - i * tile);
            Source<S> input{x + i * tile * p.in_features, p.in_features, tokens};
            Source<S> output{dy + i * tile * p.out_features, p.out_features, tokens};
            Sink<S> sink{dx ? dx + i * tile * p.in_features : nullptr, p.in_features, tokens};
            if (recompute) {  // the input's state lies where its gradient will be
                if (!stream_in) read_tile(input, dxs, p.width_in, tile, team);
                run_forward(p, w, dxs, recomputed, (S*)nullptr, stream_in ? &input : nullptr, (const Sink<S>*)nullptr,
                            (const S*)nullptr, scratch.data, tile, team);
            }
            if (!stream_out) read_tile(output, dys, p.width_out, tile, team);
            const S* middle = saved ? saved + i * states * tile : recomputed;
            steps.run(input, output, middle, sink, sum, i > division.first(all), team);
            team.barrier();
            if (dx && !stream_in) write_tile(dxs, tile, sink, (const S*)nullptr, team);
        }
        all.barrier();
        Index offset = 0;
        std::vector<S*> parts;
        for (int i = 0; i < (division.shared ? 1 : all.size); i++)  // fewer threads may run than were asked for
            parts.push_back(sums[i].data);
        for (size_t j = 0; j < p.terms.size(); j++)
            for (size_t k = 0; k < p.terms[j].size(); k++) {
                const Step& s = p.terms[j][k];
                if (S* to = dfactors[s.factor]) write_factor_gradient(s, gradients.of[j][k], parts, offset, to, all);
                offset += s.batches * gradients.of[j][k].entries();
            }
    }
}

// ---------------------------------------------------------------- one of several matrices for every token

// Pairs of a token and an expert, sorted by expert: those of expert e are order[first[e]] to order[first[e + 1] - 1].
// Pair i is of token i / active; it reads that row of x, times gates[i], and writes row i of y.
struct Pairs {
    const Index *first, *order;
    Index experts, active;
};

// Tiles of at most `tile` pairs, each of one expert.
struct PairTile {
    Index expert, start, count;
};
static std::vector<PairTile> pair_tiles(const Pairs& pairs, Index tile) {
    std::vector<PairTile> tiles;
    for (Index e = 0; e < pairs.experts; e++)
        for (Index i = pairs.first[e]; i < pairs.first[e + 1]; i += tile)
            tiles.push_back({e, i, std::min(tile, pairs.first[e + 1] - i)});
    return tiles;
}

// The factors of an expert, which are stacked.
template <class S>
static std::vector<const S*> of_expert(const Program& p, const S* const* factors, Index expert) {
    std::vector<const S*> found;
    for (auto& term : p.terms)
        for (auto& s : term) {
            found.resize(std::max<size_t>(found.size(), s.factor + 1));
            found[s.factor] = factors[s.factor] + expert * s.batches * s.rows * s.inner;
        }
    return found;
}

template <class S>
static void forward_grouped(const Program& p, const S* const* factors, const Pairs& pairs, const S* gates, const S* x,
                            S* y, int threads) {
    constexpr Index L = Simd<S>::lanes;
    Index tile = 2 * L, states = p.states();
    auto tiles = pair_tiles(pairs, tile);
    bool single = p.terms.size() == 1;
    bool stream_in = single && before(p.first()).run(), stream_out = single && after(p.last()).run();
    Index rows_in = stream_in ? 0 : p.width_in, rows_out = stream_out ? 0 : p.width_out;
    expect(y, pairs.first[pairs.experts] * p.out_features * sizeof(S));
#pragma omp parallel num_threads(threads)
    {
        Team all = everyone(), alone{0, 1};
        Buffer<S> packed(p.factor_entries()), own((rows_in + rows_out + states) * tile), scratch(2 * p.widest * tile);
        Buffer<S> inputs(tile * p.in_features), outputs(tile * p.out_features);
        S *xs = own.data, *ys = xs + rows_in * tile, *states_memory = ys + rows_out * tile;
        std::vector<Weights<S>> w;
        Index expert = -1;
        for (Index i = all.first(tiles.size()); i < all.last(tiles.size()); i++) {
            const PairTile& t = tiles[i];
            if (t.expert != expert) {
                expert = t.expert;
                bool small = pairs.first[expert + 1] - pairs.first[expert] < 4 * tile;
                w = all_weights(p, of_expert(p, factors, expert).data(), packed.data, false, small, alone);
            }
            const Index* order = pairs.order + t.start;
            for (Index r = 0; r < t.count; r++) {
                const S* from = x + order[r] / pairs.active * p.in_features;
                S *to = inputs.data + r * p.in_features, gate = gates[order[r]];
                for (Index k = 0; k < p.in_features; k++) to[k] = gate * from[k];
            }
            Source<S> source{inputs.data, p.in_features, t.count};
            Sink<S> sink{outputs.data, p.out_features, t.count};
            if (!stream_in) read_tile(source, xs, p.width_in, tile, alone);
            run_forward(p, w, xs, states_memory, ys, stream_in ? &source : nullptr, stream_out ? &sink : nullptr,
                        (const S*)nullptr, scratch.data, tile, alone);
            if (!stream_out) write_tile(ys, tile, sink, (const S*)nullptr, alone);
            for (Index r = 0; r < t.count; r++)
                std::copy_n(outputs.data + r * p.out_features, p.out_features, y + order[r] * p.out_features);
        }
    }
}

// The gradients of what every pair read (before the gate), into row i of dx for pair i, and of the stacked factors.
template <class S>
static void backward_grouped(const Program& p, const S* const* factors, const Pairs& pairs, const S* gates, const S* x,
                             const S* dy, S* dx, S* const* dfactors, int threads) {
    Index tile = 2 * Simd<S>::lanes, states = p.states();
    auto tiles = pair_tiles(pairs, tile);
    FactorGradients gradients(p, tile, S());
    if (dx) expect(dx, pairs.first[pairs.experts] * p.in_features * sizeof(S));
    bool single = p.terms.size() == 1 && p.terms[0].size() > 1;
    bool stream_in = single && before(p.first()).run(), stream_out = single && after(p.last()).run();
    Index rows_in = stream_in ? 0 : p.width_in, rows_out = stream_out ? 0 : p.width_out;
    // An expert's tiles may be shared by neighbouring threads. So a thread keeps the sums of its first expert and of its
    // last, and whose tiles begin with the expert adds them up, in order: results do not depend on who is faster.
    std::vector<Buffer<S>> firsts, lasts;
    for (int i = 0; i < threads; i++) firsts.emplace_back(gradients.entries), lasts.emplace_back(gradients.entries);
#pragma omp parallel num_threads(threads)
    {
        Team all = everyone(), alone{0, 1};
        Buffer<S> packed(p.factor_entries()), packed_forward(states ? p.factor_entries() : 0);
        Buffer<S> own((rows_out + rows_in + states + 2 * p.widest) * tile), scratch(2 * p.widest * tile);
        Buffer<S> panels(gradients.panel), inputs(tile * p.in_features), outputs(tile * p.out_features);
        Buffer<S> found(tile * p.in_features);
        S *dys = own.data, *dxs = dys + rows_out * tile, *turn = dxs + rows_in * tile;
        S* recomputed = turn + 2 * p.widest * tile;
        std::vector<Weights<S>> w, w_back;
        BackwardTile<S> steps{p,          gradients, w_back, dfactors, dx != nullptr, stream_in,
                              stream_out, tile,      dys,    dxs,      {turn, turn + p.widest * tile},
                              panels.data, scratch.data};
        Index begin = all.first(tiles.size()), end = all.last(tiles.size()), expert = -1;
        Index head = begin < end ? tiles[begin].expert : -1;
        auto write = [&](Index e, std::vector<S*> parts) {
            Index offset = 0;
            for (size_t j = 0; j < p.terms.size(); j++)
                for (size_t k = 0; k < p.terms[j].size(); k++) {
                    const Step& s = p.terms[j][k];
                    Index size = s.batches * s.rows * s.inner;
                    if (S* to = dfactors[s.factor])
                        write_factor_gradient(s, gradients.of[j][k], parts, offset, to + e * size, alone);
                    offset += s.batches * gradients.of[j][k].entries();
                }
        };
        auto sum_of = [&](Index e) { return (e == head ? firsts : lasts)[all.rank].data; };
        for (Index i = begin; i < end; i++) {
            const PairTile& t = tiles[i];
            bool fresh = t.expert != expert;
            if (fresh) {
                if (expert >= 0 && expert != head) write(expert, {sum_of(expert)});
                expert = t.expert;
                auto own_factors = of_expert(p, factors, expert);
                bool small = pairs.first[expert + 1] - pairs.first[expert] < 4 * tile;
                w_back = all_weights(p, own_factors.data(), packed.data, true, small, alone);
                if (states) w = all_weights(p, own_factors.data(), packed_forward.data, false, small, alone);
            }
            const Index* order = pairs.order + t.start;
            for (Index r = 0; r < t.count; r++) {
                Index token = order[r] / pairs.active;
                const S *from = x + token * p.in_features, gate = gates[order[r]];
                S* to = inputs.data + r * p.in_features;
                for (Index k = 0; k < p.in_features; k++) to[k] = gate * from[k];
                std::copy_n(dy + token * p.out_features, p.out_features, outputs.data + r * p.out_features);
            }
            Source<S> input{inputs.data, p.in_features, t.count}, output{outputs.data, p.out_features, t.count};
            Sink<S> sink{found.data, p.in_features, t.count};
            if (states) {
                if (!stream_in) read_tile(input, dxs, p.width_in, tile, alone);
                run_forward(p, w, dxs, recomputed, (S*)nullptr, stream_in ? &input : nullptr, (const Sink<S>*)nullptr,
                            (const S*)nullptr, scratch.data, tile, alone);
            }
            if (!stream_out) read_tile(output, dys, p.width_out, tile, alone);
            steps.run(input, output, recomputed, sink, sum_of(expert), !fresh, alone);
            if (!dx) continue;
            if (!stream_in) write_tile(dxs, tile, sink, (const S*)nullptr, alone);
            for (Index r = 0; r < t.count; r++)
                std::copy_n(found.data + r * p.in_features, p.in_features, dx + order[r] * p.in_features);
        }
        all.barrier();
        for (Index e : {head, expert}) {  // what is left: those that others may share
            if (e < 0 || (e == head && pairs.first[e] != tiles[begin].start)) continue;  // none, or another's
            std::vector<S*> parts{sum_of(e)};
            if (e == expert)
                for (int r = all.rank + 1; r < all.size; r++) {
                    Team other{r, all.size};
                    Index at = other.first(tiles.size());
                    if (at == other.last(tiles.size())) continue;
                    if (tiles[at].expert != e) break;
                    parts.push_back(firsts[r].data);
                }
            write(e, parts);
            if (head == expert) break;  // one and the same
        }
    }
}

}  // namespace

#define EXPORT(S, NAME)                                                                                            \
    extern "C" void NAME##_forward(const Index* program, const S* const* factors, const S* x, const S* bias, S* y, \
                                   S* saved, Index n, int threads) {                                               \
        forward<S>(Program(program), factors, x, bias, y, saved, n, threads);                                      \
    }                                                                                                              \
    extern "C" void NAME##_backward(const Index* program, const S* const* factors, const S* x, const S* dy,        \
                                    const S* saved, S* dx, S* const* dfactors, Index n, int threads) {             \
        backward<S>(Program(program), factors, x, dy, saved, dx, dfactors, n, threads);                            \
    }                                                                                                              \
    extern "C" void NAME##_forward_grouped(const Index* program, const S* const* factors, const Index* first,      \
                                           const Index* order, const S* gates, const S* x, S* y, Index experts,    \
                                           Index active, int threads) {                                            \
        forward_grouped<S>(Program(program), factors, Pairs{first, order, experts, active}, gates, x, y, threads); \
    }                                                                                                              \
    extern "C" void NAME##_backward_grouped(const Index* program, const S* const* factors, const Index* first,     \
                                            const Index* order, const S* gates, const S* x, const S* dy, S* dx,    \
                                            S* const* dfactors, Index experts, Index active, int threads) {        \
        backward_grouped<S>(Program(program), factors, Pairs{first, order, experts, active}, gates, x, dy, dx,     \
                            dfactors, threads);                                                                    \
    }                                                                                                              \
    extern "C" Index NAME##_tile(const Index* program, Index tokens) {                                             \
        return tile_of<S>(Program(program), tokens);                                                               \
    }
EXPORT(float, float32)
EXPORT(double, float64)
