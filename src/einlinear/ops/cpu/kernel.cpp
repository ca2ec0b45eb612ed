// Structured products on the CPU, in tiles of tokens that stay in cache.
//
// A tile holds inputs, intermediates and outputs feature-major: one row of `tile` tokens per feature. Then every
// contraction step, whatever its axes, is the same small matrix product on rows found by offset tables, and permuting
// axes costs nothing: it only changes the tables. Transposition happens where a tile is read from and written to
// token-major memory.
//
// Here: forward, backward, and the functions that Python calls.
#include <algorithm>
#include <vector>

#include "decode.h"
#include "feed_forward.h"
#include "routed.h"
#include "tiles.h"

namespace {

// Two vectors, so that the micro-kernels have enough to do; more where factors are read from memory for every tile.
template <class S>
static Index tile_of(const Program& p, Index tokens) {
    constexpr Index L = Simd<S>::lanes;
    return tokens <= L ? L : p.is_heavy() && tokens >= 8 * L ? 8 * L : 2 * L;
}

// How a call is divided: its tiles among the threads or, where there are fewer tiles than threads, every tile's
// products. `small`: so few tokens that packing the factors would not pay.
template <class S>
struct Division {
    Index tile, tiles;
    bool shared, small;

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

// `factors`: pointers to numbers, or quantised factors.
template <class T, class Factor, class S = Arithmetic<T>>
static void forward(const Program& p, const Factor* factors, const T* x, const T* bias, T* y, S* saved, Index n,
                    int threads) {
    if (!saved && decodes(p, n, Simd<S>::lanes, std::is_same_v<Factor, QuantizedFactor>))
        return decode(p, factors, x, bias, y, n, threads);
    Division<S> division(p, n, threads);
    Ends ends(p, false);
    Index tile = division.tile;
    Widened<T> wide_bias(bias, p.out_features);
    advise_huge_pages(y, n * p.out_features * sizeof(T));
    if (saved) advise_huge_pages(saved, division.tiles * tile * p.intermediates * sizeof(S));
    Index room = (ends.rows_in + ends.rows_out + (saved ? 0 : p.intermediates)) * tile;
    Buffer<S> packed(p.factor_entries), common(division.shared ? room : 0);
    Team::run(threads, [&](Team all) {
        std::vector<Weights<S>> w;
        all.phase([&](Share mine) { w = all_weights(p, factors, 0, packed.data, false, division.small, mine); });
        Buffer<S> own(division.shared ? 0 : room), scratch(2 * p.widest * tile);
        S* xs = division.shared ? common.data : own.data;
        S *ys = xs + ends.rows_in * tile, *memory = ys + ends.rows_out * tile;
        ForwardTile<S> steps{p, ends, w, wide_bias.data, tile, xs, ys, scratch.data};
        division.each_tile(all, [&](Index i, Team team, bool) {
            Index first = i * tile, tokens = std::min(tile, n - first);
            Source<T> source{x + first * p.in_features, p.in_features, tokens};
            Sink<T> sink{y + first * p.out_features, p.out_features, tokens};
            steps.run(&source, saved ? saved + first * p.intermediates : memory, &sink, true, team);
        });
    });
}

template <class T, class S>
static void backward(const Program& p, const T* const* factors, const T* x, const T* dy, const S* saved, T* dx,
                     T* const* dfactors, Index n, int threads) {
    Division<S> division(p, n, threads);
    Ends ends(p, true);
    Index tile = division.tile;
    if (dx) advise_huge_pages(dx, n * p.in_features * sizeof(T));
    FactorGradients<S> gradients(p, tile);
    bool recompute = !saved && p.intermediates;
    Index room = BackwardTile<S>::room(p, ends, recompute, tile);
    Buffer<S> packed(p.factor_entries), packed_forward(recompute ? p.factor_entries : 0);
    Buffer<S> common(division.shared ? room : 0);
    std::vector<Buffer<S>> sums;
    for (int i = 0; i < (division.shared ? 1 : threads); i++) sums.emplace_back(gradients.entries);
    Team::run(threads, [&](Team all) {
        std::vector<Weights<S>> w, w_back;
        all.phase([&](Share mine) {
            w_back = all_weights(p, factors, 0, packed.data, true, division.small, mine);
            if (recompute) w = all_weights(p, factors, 0, packed_forward.data, false, division.small, mine);
        });
        Buffer<S> own(division.shared ? 0 : room), panels(gradients.panel), scratch(2 * p.widest * tile);
        S *sum = sums[division.shared ? 0 : all.rank()].data, *memory = division.shared ? common.data : own.data;
        BackwardTile<S> steps{p,         ends,          gradients, w,      w_back,      wanted_of(p, dfactors),
                              recompute, dx != nullptr, tile};
        steps.set_memory(memory), steps.panels = panels.data, steps.scratch = scratch.data;
        division.each_tile(all, [&](Index i, Team team, bool is_first) {
            Index first = i * tile, tokens = std::min(tile, n - first);
            Source<T> input{x + first * p.in_features, p.in_features, tokens};
            Source<T> output{dy + first * p.out_features, p.out_features, tokens};
            Sink<T> sink{dx ? dx + first * p.in_features : nullptr, p.in_features, tokens};
            steps.run(&input, nullptr, &output, saved ? saved + first * p.intermediates : nullptr, &sink, sum, !is_first,
                      tokens, team);
        });
        all.phase([&](Share mine) {
            // fewer threads may run than were asked for
            std::vector<S*> parts;
            for (int i = 0; i < (division.shared ? 1 : all.size()); i++) parts.push_back(sums[i].data);
            write_factor_gradients(p, gradients, parts, dfactors, 0, mine);
        });
    });
}

}  // namespace

// The functions that Python calls. `pairs` is null where there is a single matrix. A library has them for one type of
// numbers, so that nobody waits for the compilation of types that are not used.
#if defined(EINLINEAR_NUMBER)
using Number = EINLINEAR_NUMBER;

extern "C" {
void einlinear_forward(const Index* program, const Number* const* factors, const Number* x, const Number* bias,
                       Number* y, Arithmetic<Number>* saved, const Pairs<Number>* pairs, Index n, int threads) {
    if (pairs) return forward_routed<Number>(Program(program), factors, *pairs, x, bias, y, threads);
    forward(Program(program), factors, x, bias, y, saved, n, threads);
}
void einlinear_forward_quantized(const Index* program, const QuantizedFactor* factors, const Number* x,
                                 const Number* bias, Number* y, Index n, int threads) {
    forward(Program(program), factors, x, bias, y, (Arithmetic<Number>*)nullptr, n, threads);
}
void einlinear_backward(const Index* program, const Number* const* factors, Number* const* dfactors, const Number* x,
                        const Number* dy, const Arithmetic<Number>* saved, Number* dx, Number* dgates,
                        const Pairs<Number>* pairs, Index n, int threads) {
    if (pairs) return backward_routed<Number>(Program(program), factors, *pairs, x, dy, dx, dgates, dfactors, threads);
    backward(Program(program), factors, x, dy, saved, dx, dfactors, n, threads);
}
void einlinear_feed_forward(const BlockArguments<Number>* block, const Number* x, Number* y, Index n, int threads) {
    feed_forward(*block, x, y, n, threads);
}
void einlinear_feed_forward_backward(const BlockArguments<Number>* block, const BlockGradients<Number>* wanted,
                                     const Number* x, const Number* dy, Number* dx, Index n, int threads) {
    feed_forward_backward(*block, *wanted, x, dy, dx, n, threads);
}
Index einlinear_tile(const Index* program, Index n) { return tile_of<Arithmetic<Number>>(Program(program), n); }
}
#endif
