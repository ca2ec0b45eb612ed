// Feed-forward blocks: y = down(act(up(x))) or, with a gate, y = down(act(gate(x)) * up(x)).
//
// A tile of tokens goes through all layers. Its hidden features are rows of the tile, which no token-major memory holds:
// they are activated where the last step of `up` leaves them, and the first step of `down` reads them there. Backward,
// they are computed again from the input of the block.
#pragma once

#include <algorithm>
#include <vector>

#include "activations.h"
#include "tiles.h"

namespace {

// As Python passes them (fused_block.py): a layer's structure, factors and bias, or null.
template <class T>
struct LayerArguments {
    const Index* program;
    const T* const* factors;
    const T* bias;
};
// Without a gate, its program is null. With a residual, x is added to y.
template <class T>
struct BlockArguments {
    LayerArguments<T> up, gate, down;
    Index activation, residual;
};
// Where the gradients of a layer go; null where they are not wanted.
template <class T>
struct LayerGradients {
    T* const* factors;
    T* bias;
};
template <class T>
struct BlockGradients {
    LayerGradients<T> up, gate, down;
};

// A layer of a block. Its packed factors are common to all threads.
template <class T>
struct Layer {
    using S = Arithmetic<T>;
    const T* const* factors;
    Program p;
    Ends ends;
    Widened<T> bias;
    Buffer<S> packed, packed_back;

    // `has_in`, `has_out`: whether the ends are in token-major memory, which the steps may read and write themselves
    Layer(const LayerArguments<T>& layer, bool backward, bool has_in, bool has_out)
        : factors(layer.factors),
          p(layer.program),
          ends(p, backward, has_in, has_out),
          bias(layer.bias, p.out_features),
          packed(p.factor_entries),
          packed_back(backward ? p.factor_entries : 0) {}

    std::vector<Weights<S>> weights(bool back, bool small, Share mine) {
        return all_weights(p, factors, 0, back ? packed_back.data : packed.data, back, small, mine);
    }
};

// The layers of a block, in the order of a forward pass. A gated block reads its input twice, and adds to its gradient:
// then this end has rows.
template <class T>
struct Block {
    using S = Arithmetic<T>;
    static constexpr Index tile = 2 * Simd<S>::lanes;
    bool gated;
    std::vector<Layer<T>> layers;
    // of the input, the hidden features and the output; rows of hidden features, with those that steps add
    Index in_features, hidden, out_features, hidden_rows = 0;
    // of the layer that has the most
    Index widest = 0, intermediates = 0, rows_in = 0;

    Block(const BlockArguments<T>& block, bool backward) : gated(block.gate.program) {
        layers.reserve(3);
        if (gated) layers.emplace_back(block.gate, backward, false, false);
        layers.emplace_back(block.up, backward, !gated, false);
        layers.emplace_back(block.down, backward, false, true);
        in_features = up().p.in_features, hidden = up().p.out_features, out_features = down().p.out_features;
        for (auto& layer : layers) {
            widest = std::max(widest, layer.p.widest);
            intermediates = std::max(intermediates, layer.p.intermediates);
            hidden_rows = std::max(hidden_rows, &layer == &down() ? layer.p.width_in : layer.p.width_out);
            if (&layer != &down()) rows_in = std::max(rows_in, layer.p.width_in);
        }
    }
    Layer<T>& gate() { return layers.front(); }
    Layer<T>& up() { return layers[gated]; }
    Layer<T>& down() { return layers.back(); }
};

// The number of tiles, and of threads that have one.
static Index tiles_of(Index n, Index tile) { return (n + tile - 1) / tile; }

// The hidden features of a tile, forward, in rows: those of `up`, and those of `gate` if there is one. A product's rows
// are finished when it has written them; those of `gate` come first.
template <class T>
struct HiddenRows {
    using S = Arithmetic<T>;
    Block<T>& block;
    S *u, *g;

    // Call `work` with each vector of such rows: with its offset, and the bias of its feature.
    template <class Work>
    Finish each(const Layer<T>& layer, Work work) const {
        const Index hidden = block.hidden, tile = block.tile;
        const S* bias = layer.bias.data;
        return [=](Index first, const Index* offsets, Index count) {
            for (Index i = 0; i < count; i++) {
                // steps may have rows for more features
                const Index feature = first + offsets[i];
                if (feature >= hidden) continue;
                const Vec<S> added = Vec<S>{} + (bias ? bias[feature] : S(0));
                for (Index t = 0; t < tile; t += Simd<S>::lanes) work(feature * tile + t, added);
            }
        };
    }
    // g becomes act(g + bias)
    template <Activation A>
    Finish finish_gate() const {
        return each(block.gate(),
                    [g = g](Index at, Vec<S> bias) { store(g + at, activate<A, S>(load(g + at) + bias).value); });
    }
    // u becomes act(u + bias), or (u + bias) * g
    template <Activation A>
    Finish finish_up() const {
        if (block.gated)
            return each(block.up(), [u = u, g = g](Index at, Vec<S> bias) {
                store(u + at, (load(u + at) + bias) * load(g + at));
            });
        return each(block.up(),
                    [u = u](Index at, Vec<S> bias) { store(u + at, activate<A, S>(load(u + at) + bias).value); });
    }
    // The same for a backward pass: h becomes what is above, and g and u its derivatives.
    template <Activation A>
    Finish differentiate_gate(S* h) const {
        return each(block.gate(), [g = g, h](Index at, Vec<S> bias) {
            auto a = activate<A, S>(load(g + at) + bias);
            store(h + at, a.value), store(g + at, a.slope);
        });
    }
    template <Activation A>
    Finish differentiate_up(S* h) const {
        if (block.gated)
            return each(block.up(), [u = u, g = g, h](Index at, Vec<S> bias) {
                Vec<S> value = load(u + at) + bias, gate = load(h + at);
                store(h + at, gate * value), store(u + at, gate), store(g + at, load(g + at) * value);
            });
        return each(block.up(), [u = u, h](Index at, Vec<S> bias) {
            auto a = activate<A, S>(load(u + at) + bias);
            store(h + at, a.value), store(u + at, a.slope);
        });
    }
};

// derivatives *= the gradient of the activated features: the gradient of a layer's output, whose sums over tokens are
// added to those of its bias
template <class S>
static void multiply_hidden(Index hidden, Index rows, Index tile, const S* grad, S* derivatives, S* sums) {
    constexpr Index L = Simd<S>::lanes;
    for (Index f = 0; f < hidden; f++) {
        Vec<S> sum{};
        for (Index at = f * tile; at < (f + 1) * tile; at += L) {
            Vec<S> product = load(grad + at) * load(derivatives + at);
            store(derivatives + at, product), sum += product;
        }
        for (Index l = 0; l < L; l++) sums[f] += sum[l];
    }
    std::fill(derivatives + hidden * tile, derivatives + rows * tile, S(0));
}

// to += from, of token-major memory
template <class T>
static void add_to(const T* from, T* to, Index count) {
    for (Index i = 0; i < count; i++) to[i] = to[i] + from[i];
}

template <class T>
static void feed_forward(const BlockArguments<T>& arguments, const T* x, T* y, Index n, int threads) {
    using S = Arithmetic<T>;
    Block<T> block(arguments, false);
    const Index tile = block.tile, tiles = tiles_of(n, tile), hidden_size = block.hidden_rows * tile;
    advise_huge_pages(y, n * block.out_features * sizeof(T));
    Layer<T>&up = block.up(), &gate = block.gate(), &down = block.down();
    Team::run(std::min<Index>(threads, tiles), [&](Team all) {
        std::vector<Weights<S>> w_up, w_gate, w_down;
        all.phase([&](Share mine) {
            const bool small = tiles < 4;
            if (block.gated) w_gate = gate.weights(false, small, mine);
            w_up = up.weights(false, small, mine), w_down = down.weights(false, small, mine);
        });
        Buffer<S> hidden(hidden_size), gates(block.gated ? hidden_size : 0), xs(block.rows_in * tile);
        Buffer<S> ys(down.ends.rows_out * tile), intermediates(block.intermediates * tile);
        Buffer<S> scratch(2 * block.widest * tile);
        ForwardTile<S> up_tile{up.p, up.ends, w_up, nullptr, tile, xs.data, hidden.data, scratch.data};
        ForwardTile<S> gate_tile{gate.p, gate.ends, w_gate, nullptr, tile, xs.data, gates.data, scratch.data};
        ForwardTile<S> down_tile{down.p, down.ends, w_down,  down.bias.data, tile, hidden.data,
                                 ys.data, scratch.data};
        Finish finish_up, finish_gate;
        with_activation(arguments.activation, [&](auto constant) {
            constexpr Activation A = decltype(constant)::value;
            HiddenRows<T> rows{block, hidden.data, gates.data};
            finish_up = rows.template finish_up<A>(), finish_gate = rows.template finish_gate<A>();
        });
        all.phase([&](Share mine) {
            for (Index i = mine.first(tiles); i < mine.last(tiles); i++) {
                const Index first = i * tile, tokens = std::min(tile, n - first);
                Source<T> source{x + first * block.in_features, block.in_features, tokens};
                Sink<T> sink{y + first * block.out_features, block.out_features, tokens};
                const Source<T>* none = nullptr;
                const Sink<T>* nowhere = nullptr;
                if (block.gated) read_tile(source, xs.data, block.rows_in, tile, Share::whole());
                if (block.gated) gate_tile.run(none, intermediates.data, nowhere, true, Team::alone(), &finish_gate);
                up_tile.run(block.gated ? none : &source, intermediates.data, nowhere, true, Team::alone(), &finish_up);
                std::fill(hidden.data + block.hidden * tile, hidden.data + hidden_size, S(0));
                down_tile.run(none, intermediates.data, &sink, true, Team::alone());
                if (arguments.residual) add_to(source.data, sink.data, tokens * block.out_features);
            }
        });
    });
}

// Gradients of a layer, summed by each thread, and its factors for a step back.
template <class T>
struct LayerBack {
    using S = Arithmetic<T>;
    Layer<T>& layer;
    const LayerGradients<T>& wanted;
    FactorGradients<S> gradients;
    std::vector<Buffer<S>> sums, bias_sums;

    LayerBack(Layer<T>& layer, const LayerGradients<T>& wanted, Index tile, int threads)
        : layer(layer), wanted(wanted), gradients(layer.p, tile) {
        for (int i = 0; i < threads; i++) {
            sums.emplace_back(gradients.entries), bias_sums.emplace_back(layer.p.out_features);
            std::fill_n(bias_sums.back().data, layer.p.out_features, S(0));
        }
    }
    // the tile back of a thread, without memory for gradients of the ends
    BackwardTile<S> tile_back(const std::vector<Weights<S>>& w, const std::vector<Weights<S>>& w_back, bool wants_x,
                              Index tile) const {
        return {layer.p, layer.ends, gradients, w, w_back, wanted_of(layer.p, wanted.factors), false, wants_x, tile};
    }
    void write(int threads, Share mine) {
        std::vector<S*> parts;
        for (int i = 0; i < threads; i++) parts.push_back(sums[i].data);
        write_factor_gradients(layer.p, gradients, parts, wanted.factors, 0, mine);
        if (!wanted.bias) return;
        for (Index j = mine.first(layer.p.out_features); j < mine.last(layer.p.out_features); j++) {
            S sum = 0;
            for (int i = 0; i < threads; i++) sum += bias_sums[i].data[j];
            wanted.bias[j] = sum;
        }
    }
};

template <class T>
static void feed_forward_backward(const BlockArguments<T>& arguments, const BlockGradients<T>& wanted, const T* x,
                                  const T* dy, T* dx, Index n, int threads) {
    using S = Arithmetic<T>;
    Block<T> block(arguments, true);
    const Index tile = block.tile, tiles = tiles_of(n, tile), hidden_size = block.hidden_rows * tile;
    threads = std::min<Index>(threads, tiles);
    if (dx) advise_huge_pages(dx, n * block.in_features * sizeof(T));
    LayerBack<T> up(block.up(), wanted.up, tile, threads), down(block.down(), wanted.down, tile, threads);
    LayerBack<T> gate(block.gate(), block.gated ? wanted.gate : wanted.up, tile, block.gated ? threads : 0);
    Team::run(threads, [&](Team all) {
        std::vector<Weights<S>> w_up, w_gate, w_down, back_up, back_gate, back_down;
        all.phase([&](Share mine) {
            const bool small = tiles < 4;
            w_up = up.layer.weights(false, small, mine), back_up = up.layer.weights(true, small, mine);
            w_down = down.layer.weights(false, small, mine), back_down = down.layer.weights(true, small, mine);
            if (!block.gated) return;
            w_gate = gate.layer.weights(false, small, mine), back_gate = gate.layer.weights(true, small, mine);
        });
        const int rank = all.rank();
        Index panel = std::max({up.gradients.panel, gate.gradients.panel, down.gradients.panel});
        Buffer<S> u(hidden_size), g(block.gated ? hidden_size : 0), h(hidden_size), dh(hidden_size);
        Buffer<S> xs(block.rows_in * tile), dxs(block.rows_in * tile), dys(down.layer.ends.rows_out * tile);
        Buffer<S> turns(2 * block.widest * tile), panels(panel), scratch(2 * block.widest * tile);
        Buffer<S> of_up(up.layer.p.intermediates * tile), of_down(down.layer.p.intermediates * tile);
        Buffer<S> of_gate(block.gated ? gate.layer.p.intermediates * tile : 0);
        auto forward_tile = [&](Layer<T>& layer, const std::vector<Weights<S>>& w, S* from, S* to) {
            return ForwardTile<S>{layer.p, layer.ends, w, nullptr, tile, from, to, scratch.data};
        };
        auto up_tile = forward_tile(up.layer, w_up, xs.data, u.data);
        auto gate_tile = forward_tile(gate.layer, w_gate, xs.data, g.data);
        auto down_tile = forward_tile(down.layer, w_down, h.data, nullptr);
        auto backward_tile = [&](LayerBack<T>& layer, auto& w, auto& w_back, S* grad, S* to, bool wants_x) {
            BackwardTile<S> result = layer.tile_back(w, w_back, wants_x, tile);
            result.dys = grad, result.dxs = to, result.turns = turns.data, result.panels = panels.data;
            result.scratch = scratch.data;
            return result;
        };
        auto up_back = backward_tile(up, w_up, back_up, u.data, dxs.data, dx);
        auto gate_back = backward_tile(gate, w_gate, back_gate, g.data, dxs.data, dx);
        auto down_back = backward_tile(down, w_down, back_down, dys.data, dh.data, true);
        Finish finish_up, finish_gate;
        with_activation(arguments.activation, [&](auto constant) {
            constexpr Activation A = decltype(constant)::value;
            HiddenRows<T> rows{block, u.data, g.data};
            finish_up = rows.template differentiate_up<A>(h.data);
            finish_gate = rows.template differentiate_gate<A>(h.data);
        });
        all.phase([&](Share mine) {
            for (Index i = mine.first(tiles); i < mine.last(tiles); i++) {
                const bool more = i > mine.first(tiles);
                const Index first = i * tile, tokens = std::min(tile, n - first);
                Source<T> source{x + first * block.in_features, block.in_features, tokens};
                Source<T> output{dy + first * block.out_features, block.out_features, tokens};
                Sink<T> sink{dx ? dx + first * block.in_features : nullptr, block.in_features, tokens};
                const Source<T>* none = nullptr;
                const Sink<T>* nowhere = nullptr;
                const Team alone = Team::alone();
                if (block.gated) read_tile(source, xs.data, block.rows_in, tile, Share::whole());
                if (block.gated) gate_tile.run(none, of_gate.data, nowhere, true, alone, &finish_gate);
                up_tile.run(block.gated ? none : &source, of_up.data, nowhere, true, alone, &finish_up);
                std::fill(h.data + block.hidden * tile, h.data + hidden_size, S(0));
                down_tile.run(none, of_down.data, nowhere, false, alone);
                down_back.run(none, h.data, &output, of_down.data, nowhere, down.sums[rank].data, more, tokens, alone);
                if (block.gated) {
                    multiply_hidden(block.hidden, block.hidden_rows, tile, dh.data, g.data, gate.bias_sums[rank].data);
                    gate_back.run(&source, xs.data, none, of_gate.data, nowhere, gate.sums[rank].data, more, tokens,
                                  alone);
                }
                multiply_hidden(block.hidden, block.hidden_rows, tile, dh.data, u.data, up.bias_sums[rank].data);
                up_back.run(&source, xs.data, none, of_up.data, &sink, up.sums[rank].data, more, tokens, alone,
                            block.gated);
                if (dx && arguments.residual) add_to(output.data, sink.data, tokens * block.in_features);
                if (wanted.down.bias)
                    for (Index t = 0; t < tokens; t++)
                        for (Index j = 0; j < block.out_features; j++)
                            down.bias_sums[rank].data[j] += (S)output.data[t * block.out_features + j];
            }
        });
        all.phase([&](Share mine) {
            // fewer threads may run than were asked for
            up.write(all.size(), mine), down.write(all.size(), mine);
            if (block.gated) gate.write(all.size(), mine);
        });
    });
}

}  // namespace
