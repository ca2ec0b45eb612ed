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
// team.h        the threads, and how work is divided among them
// steps.h       a thread's share of a step of a tile
// passes.h      a tile through all steps, forward and back
// decode.h      fewer tokens than make a tile
// routed.h      one of several matrices for every token
//
// Here: forward, backward, and the functions that Python calls.
#include <algorithm>
#include <vector>

#include "decode.h"
#include "passes.h"
#include "routed.h"

namespace {

// Two vectors, so that the micro-kernels have enough to do; more where factors are read from memory for every tile.
template <class S>
static Index tile_of(const Program& p, Index tokens) {
    constexpr Index L = Simd<S>::lanes;
    return tokens <= L ? L : p.heavy() && tokens >= 8 * L ? 8 * L : 2 * L;
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

    // Call `work` with each tile and the team that does it: all threads together, or one alone.
    template <class Work>
    void each_tile(Team all, Work work) const {
        if (shared)
            for (Index i = 0; i < tiles; i++) work(i, all, i == 0);
        else
            all.phase([&](Share mine) {
                Index first = mine.first(tiles);
                for (Index i = first; i < mine.last(tiles); i++) work(i, Team::alone(), i == first);
            });
    }
};

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
    Team::run(threads, [&](Team all) {
        std::vector<Weights<S>> w;
        all.phase([&](Share mine) { w = all_weights(p, factors, packed.data, false, division.small, mine); });
        Buffer<S> own(division.shared ? 0 : room), scratch(2 * p.widest * tile);
        S* xs = division.shared ? common.data : own.data;
        S *ys = xs + rows_in * tile, *states_memory = ys + rows_out * tile;
        division.each_tile(all, [&](Index i, Team team, bool) {
            Index tokens = std::min(tile, n - i * tile);
            Source<S> source{x + i * tile * p.in_features, p.in_features, tokens};
            Sink<S> sink{y + i * tile * p.out_features, p.out_features, tokens};
            if (!stream_in) team.phase([&](Share mine) { read_tile(source, xs, p.width_in, tile, mine); });
            run_forward(p, w, xs, saved ? saved + i * states * tile : states_memory, ys, stream_in ? &source : nullptr,
                        stream_out ? &sink : nullptr, bias, scratch.data, tile, team);
            if (!stream_out) team.phase([&](Share mine) { write_tile(ys, tile, sink, bias, mine); });
        });
    });
}

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
    Team::run(threads, [&](Team all) {
        std::vector<Weights<S>> w, w_back;
        all.phase([&](Share mine) {
            w_back = all_weights(p, factors, packed.data, true, division.small, mine);
            if (recompute) w = all_weights(p, factors, packed_forward.data, false, division.small, mine);
        });
        Buffer<S> own(division.shared ? 0 : room), panels(gradients.panel), scratch(2 * p.widest * tile);
        S* sum = sums[division.shared ? 0 : all.rank()].data;
        S* dys = division.shared ? common.data : own.data;
        S *dxs = dys + rows_out * tile, *turn = dxs + rows_in * tile, *recomputed = turn + 2 * p.widest * tile;
        BackwardTile<S> steps{p,    gradients, w_back, dfactors,    dx != nullptr,
                              stream_in, stream_out, tile, dys, dxs, {turn, turn + p.widest * tile},
                              panels.data, scratch.data};
        division.each_tile(all, [&](Index i, Team team, bool first) {
            Index tokens = std::min(tile, n - i * tile);
            Source<S> input{x + i * tile * p.in_features, p.in_features, tokens};
            Source<S> output{dy + i * tile * p.out_features, p.out_features, tokens};
            Sink<S> sink{dx ? dx + i * tile * p.in_features : nullptr, p.in_features, tokens};
            if (recompute) {  // the input's state lies where its gradient will be
                if (!stream_in) team.phase([&](Share mine) { read_tile(input, dxs, p.width_in, tile, mine); });
                run_forward(p, w, dxs, recomputed, (S*)nullptr, stream_in ? &input : nullptr, (const Sink<S>*)nullptr,
                            (const S*)nullptr, scratch.data, tile, team);
            }
            if (!stream_out) team.phase([&](Share mine) { read_tile(output, dys, p.width_out, tile, mine); });
            const S* middle = saved ? saved + i * states * tile : recomputed;
            steps.run(input, output, middle, sink, sum, !first, team);
            if (dx && !stream_in) team.phase([&](Share mine) { write_tile(dxs, tile, sink, (const S*)nullptr, mine); });
        });
        all.phase([&](Share mine) {
            std::vector<S*> parts;
            for (int i = 0; i < (division.shared ? 1 : all.size()); i++)  // fewer threads may run than were asked for
                parts.push_back(sums[i].data);
            write_factor_gradients(p, gradients, parts, dfactors, 0, mine);
        });
    });
}

}  // namespace

// The functions that Python calls. `pairs` is null where there is a single matrix.
#define EXPORT(S, NAME)                                                                                            \
    extern "C" void NAME##_forward(const Index* program, const S* const* factors, const S* x, const S* bias, S* y, \
                                   S* saved, const Pairs<S>* pairs, Index n, int threads) {                        \
        if (pairs) return forward_routed<S>(Program(program), factors, *pairs, x, bias, y, threads);               \
        forward<S>(Program(program), factors, x, bias, y, saved, n, threads);                                      \
    }                                                                                                              \
    extern "C" void NAME##_backward(const Index* program, const S* const* factors, const S* x, const S* dy,        \
                                    const S* saved, S* dx, S* const* dfactors, S* dgates, const Pairs<S>* pairs,   \
                                    Index n, int threads) {                                                        \
        if (pairs)                                                                                                 \
            return backward_routed<S>(Program(program), factors, *pairs, x, dy, dx, dgates, dfactors, threads);    \
        backward<S>(Program(program), factors, x, dy, saved, dx, dfactors, n, threads);                            \
    }                                                                                                              \
    extern "C" Index NAME##_tile(const Index* program, Index tokens) {                                             \
        return tile_of<S>(Program(program), tokens);                                                               \
    }
EXPORT(float, float32)
EXPORT(double, float64)
