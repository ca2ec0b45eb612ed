// The kernel as a program of its own, for the sanitizers: it reads structures, runs every entry point on random numbers
// and compares several threads with one. Outputs start as NaN, so what is left unwritten shows as well.
//
// Usage: sanitized_kernel FILE
// Compiled with -DTYPES=2, one of both precisions is a float and one of both halves a bfloat16; with -DTYPES=1 all are
// floats. By default (4) all are what their names say.
// FILE holds int64 numbers: for each structure the count of numbers in its program, then these (cpu_backend.py). Of
// every eight programs, factors of the last four are matrices.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <type_traits>

#include "std_threads.h"

#include "kernel.cpp"

static std::mt19937 generator(0);

#ifndef TYPES
#define TYPES 4
#endif
using Single = float;
using Double = std::conditional_t<TYPES == 4, double, float>;
using Brain = std::conditional_t<TYPES == 1, float, BFloat16>;
using Half = std::conditional_t<TYPES == 4, Float16, Brain>;

template <class S>
struct Array {
    std::vector<S> values;
    explicit Array(size_t count, bool random = true)
        : values(count, S(std::numeric_limits<Arithmetic<S>>::quiet_NaN())) {
        std::normal_distribution<double> normal;
        if (random)
            for (S& value : values) value = S((Arithmetic<S>)normal(generator));
    }
};

template <class S>
static void same(const std::vector<S>& found, const std::vector<S>& expected, const char* what, int threads, Index n) {
    double largest = 1;
    for (S value : expected) largest = std::max(largest, std::fabs((double)value));
    // half precision may round to the next number on either side
    const double close = sizeof(S) == 2 ? 1e-2 : 1e-3;
    for (size_t i = 0; i < expected.size(); i++)
        if (!(std::fabs((double)found[i] - (double)expected[i]) < close * largest)) {
            std::fprintf(stderr, "%s of %ld tokens on %d threads: %g instead of %g\n", what, (long)n, threads,
                         (double)found[i], (double)expected[i]);
            std::exit(1);
        }
}

template <class S>
struct Factors {
    std::vector<Array<S>> arrays;
    std::vector<S*> pointers;
    Factors(const Program& p, Index stack, bool random) {
        for (auto& s : p.steps) arrays.emplace_back(stack * s.entries(), random);
        for (auto& array : arrays) pointers.push_back(array.values.data());
    }
};

// Forward and backward with intermediates saved and recomputed, for random choices of the gradients that are wanted.
template <class S>
static void one_matrix(const Index* numbers, Index n, const std::vector<int>& counts) {
    Program p(numbers);
    Factors<S> factors(p, 1, true);
    Array<S> x(n * p.in_features), bias(p.out_features), dy(n * p.out_features);
    Index tile = tile_of<Arithmetic<S>>(p, n), padded = (n + tile - 1) / tile * tile;
    for (bool save : {false, true})
        for (int choice = 0; choice < 3; choice++) {
            bool wants_x = choice == 1;
            unsigned wanted = choice == 2 ? generator() : ~0u;
            std::vector<S> first_y, first_dx;
            std::vector<std::vector<S>> first;
            for (int threads : counts) {
                Array<S> y(n * p.out_features, false), dx(n * p.in_features, false);
                Array<Arithmetic<S>> saved(save ? padded * p.intermediates : 0, false);
                Arithmetic<S>* intermediates = saved.values.empty() ? nullptr : saved.values.data();
                forward<S>(Program(numbers), factors.pointers.data(), x.values.data(), bias.values.data(),
                           y.values.data(), intermediates, n, threads);
                Factors<S> grads(p, 1, false);
                std::vector<S*> to = grads.pointers;
                for (size_t i = 0; i < to.size(); i++)
                    if (!(wanted >> i & 1)) to[i] = nullptr;
                backward<S>(Program(numbers), factors.pointers.data(), x.values.data(), dy.values.data(), intermediates,
                            wants_x ? dx.values.data() : nullptr, to.data(), n, threads);
                if (threads == counts[0]) {
                    first_y = y.values, first_dx = dx.values;
                    for (auto& grad : grads.arrays) first.push_back(grad.values);
                }
                same(y.values, first_y, "output", threads, n);
                if (wants_x) same(dx.values, first_dx, "gradient of x", threads, n);
                for (size_t i = 0; i < to.size(); i++)
                    if (to[i]) same(grads.arrays[i].values, first[i], "gradient of a factor", threads, n);
            }
        }
}

// Forward with factors of random formats, compared with the same factors in the type of arithmetic; codes if `matrices`.
template <class S>
static void quantized_factors(const Index* numbers, bool matrices, Index n, const std::vector<int>& counts) {
    Program p(numbers);
    std::vector<std::vector<uint8_t>> data;
    std::vector<std::vector<BFloat16>> scales;
    std::vector<QuantizedFactor> quantized;
    std::vector<std::vector<Arithmetic<S>>> expanded;
    std::vector<Arithmetic<S>*> pointers;
    for (auto& s : p.steps) {
        const Index bits = matrices ? 2 + generator() % 7 : 16, columns = s.in.features, rows = s.entries() / columns;
        const Index group = std::vector<Index>{columns, 32, 7}[generator() % 3];
        Index row_bytes = 0, groups = (columns + group - 1) / group;
        for (Index width : {16, 8, 4, 2, 1})
            if (bits & width) row_bytes += (columns * width + 7) / 8;
        data.emplace_back(rows * row_bytes), scales.emplace_back(rows * groups);
        for (uint8_t& byte : data.back()) byte = generator();
        BFloat16* halves = (BFloat16*)data.back().data();
        for (BFloat16& scale : scales.back()) scale = BFloat16(1 + generator() % 9);
        if (bits == 16)
            for (Index i = 0; i < s.entries(); i++) halves[i] = BFloat16(generator() % 9 - 4.f);
        quantized.push_back({data.back().data(), scales.back().data(), bits, group, groups, row_bytes});
        // bit by bit, by the definition of the format
        expanded.emplace_back(s.entries());
        for (Index i = 0; i < s.entries(); i++) {
            const uint8_t* part = data.back().data() + i / columns * row_bytes;
            Index code = 0, shift = 0, k = i % columns;
            for (Index width : {8, 4, 2, 1}) {
                if (!(bits & width)) continue;
                for (Index bit = 0; bit < width; bit++)
                    code |= Index(part[(k * width + bit) / 8] >> (k * width + bit) % 8 & 1) << (shift + bit);
                part += (columns * width + 7) / 8, shift += width;
            }
            const BFloat16* of_row = scales.back().data() + i / columns * groups;
            expanded.back()[i] = bits == 16 ? (float)halves[i]
                                            : (code - (Index(1) << (bits - 1))) * (float)of_row[k / group];
        }
    }
    for (auto& factor : expanded) pointers.push_back(factor.data());
    Array<S> x(n * p.in_features), bias(p.out_features);
    std::vector<Arithmetic<S>> wide_x(x.values.begin(), x.values.end());
    std::vector<Arithmetic<S>> wide_bias(bias.values.begin(), bias.values.end()), wide_y(n * p.out_features);
    forward<Arithmetic<S>>(p, pointers.data(), wide_x.data(), wide_bias.data(), wide_y.data(),
                           (Arithmetic<S>*)nullptr, n, 1);
    for (int threads : counts) {
        Array<S> y(n * p.out_features, false);
        forward(p, quantized.data(), x.values.data(), bias.values.data(), y.values.data(), (Arithmetic<S>*)nullptr, n,
                threads);
        same(y.values, std::vector<S>(wide_y.begin(), wide_y.end()), "output of quantized factors", threads, n);
    }
}

// The same for one of several matrices a token, two of them for each.
template <class S>
static void several_matrices(const Index* numbers, Index n, const std::vector<int>& counts) {
    constexpr Index EXPERTS = 3, ACTIVE = 2;
    Program p(numbers);
    Factors<S> factors(p, EXPERTS, true);
    Array<S> x(n * p.in_features), bias(p.out_features), dy(n * p.out_features), gates(n * ACTIVE);
    std::vector<S> first_y, first_dx, first_dgates;
    std::vector<std::vector<S>> first_grads;
    for (bool wants_x : {false, true})
        for (int threads : counts) {
            Index block = std::max<Index>(1, n / threads), blocks = (n + block - 1) / block;
            std::vector<std::vector<Index>> cells(blocks * EXPERTS);
            for (Index token = 0; token < n; token++)  // the last expert gets few, so that some blocks lack it
                for (Index a = 0; a < ACTIVE; a++)
                    cells[token / block * EXPERTS + (token % 5 ? a : a + 1)].push_back(token * ACTIVE + a);
            std::vector<Index> begins{0}, order;
            for (auto& cell : cells) {
                order.insert(order.end(), cell.begin(), cell.end());
                begins.push_back(order.size());
            }
            Pairs<S> pairs{begins.data(), order.data(), gates.values.data(), n, block, EXPERTS, ACTIVE};
            Array<S> y(n * p.out_features, false), dx(n * p.in_features, false), dgates(n * ACTIVE, false);
            forward_routed<S>(Program(numbers), factors.pointers.data(), pairs, x.values.data(), bias.values.data(),
                               y.values.data(), threads);
            Factors<S> grads(p, EXPERTS, false);
            backward_routed<S>(Program(numbers), factors.pointers.data(), pairs, x.values.data(), dy.values.data(),
                                wants_x ? dx.values.data() : nullptr, wants_x ? dgates.values.data() : nullptr,
                                grads.pointers.data(), threads);
            if (threads == counts[0]) {
                first_y = y.values, first_dx = dx.values, first_dgates = dgates.values, first_grads.clear();
                for (auto& grad : grads.arrays) first_grads.push_back(grad.values);
            }
            same(y.values, first_y, "output of experts", threads, n);
            if (wants_x) same(dx.values, first_dx, "gradient of x through experts", threads, n);
            if (wants_x) same(dgates.values, first_dgates, "gradient of gates", threads, n);
            for (size_t i = 0; i < first_grads.size(); i++)
                same(grads.arrays[i].values, first_grads[i], "gradient of experts", threads, n);
        }
}

// The program of a dense matrix.
static std::vector<Index> dense(Index in, Index out) {
    std::vector<Index> p{1, 1, in, out, /*term, begins, ends*/ 0, 1, 1, /*batch, free, new, contracted*/ 1, 1, out, in};
    // widths, strides of the ends and of the factor
    for (Index number : {in, out, Index(1), Index(1), in, Index(1)}) p.push_back(number);
    auto table = [&](Index length, Index stride) {
        for (Index i = 0; i < length; i++) p.push_back(i * stride);
    };
    // of the input, the output and the factor: batch, free and contracted or new
    table(1, 1), table(1, 1), table(in, 1), table(1, 1), table(1, 1), table(out, 1), table(1, 1), table(out, in);
    table(in, 1);
    return p;
}

// A feed-forward block of these structures, with a gate of the same structure as `up` or a dense one, or none.
template <class S>
static void one_block(const Index* up, const Index* gate, const Index* down, Index n, const std::vector<int>& counts) {
    const Index* layers[] = {up, gate, down};
    std::vector<Factors<S>> factors;
    std::vector<Array<S>> biases;
    LayerArguments<S> arguments[3] = {};
    for (int i = 0; i < 3; i++) {
        if (!layers[i]) continue;
        factors.emplace_back(Program(layers[i]), 1, true), biases.emplace_back(Program(layers[i]).out_features);
    }
    for (int i = 0, j = 0; i < 3; i++)
        if (layers[i]) arguments[i] = {layers[i], factors[j].pointers.data(), biases[j].values.data()}, j++;
    Index in = Program(up).in_features, out = Program(down).out_features;
    Array<S> x(n * in), dy(n * out);
    std::vector<std::vector<S>> first;
    const Index activation = generator() % (TANH + 1);
    BlockArguments<S> block{arguments[0], arguments[1], arguments[2], activation, in == out};
    for (int threads : counts) {
        Array<S> y(n * out, false), dx(n * in, false);
        feed_forward(block, x.values.data(), y.values.data(), n, threads);
        std::vector<Factors<S>> grads;
        std::vector<Array<S>> bias_grads;
        for (const Index* layer : layers) {
            const Index* program = layer ? layer : up;
            grads.emplace_back(Program(program), 1, false);
            bias_grads.emplace_back(Program(program).out_features, false);
        }
        auto to = [&](int i) { return LayerGradients<S>{grads[i].pointers.data(), bias_grads[i].values.data()}; };
        feed_forward_backward(block, {to(0), to(1), to(2)}, x.values.data(), dy.values.data(), dx.values.data(), n,
                              threads);
        std::vector<std::vector<S>> found{y.values, dx.values};
        for (int i = 0; i < 3; i++) {
            if (!layers[i]) continue;
            found.push_back(bias_grads[i].values);
            for (auto& grad : grads[i].arrays) found.push_back(grad.values);
        }
        if (threads == counts[0]) first = found;
        for (size_t i = 0; i < found.size(); i++) same(found[i], first[i], "a result of a block", threads, n);
    }
}
template <class S>
static void blocks(const Index* numbers, Index n, const std::vector<int>& counts) {
    Program p(numbers);
    std::vector<Index> before = dense(7, p.in_features), gate = dense(p.in_features, p.out_features);
    std::vector<Index> after = dense(p.out_features, p.in_features);
    one_block<S>(numbers, nullptr, after.data(), n, counts);
    one_block<S>(numbers, gate.data(), after.data(), n, counts);
    one_block<S>(before.data(), before.data(), numbers, n, counts);
}

int main(int count, char** arguments) {
    if (count != 2) return std::fputs("usage: sanitized_kernel FILE\n", stderr), 2;
    std::FILE* file = std::fopen(arguments[1], "rb");
    if (!file) return std::perror(arguments[1]), 2;
    Index length, programs = 0;
    const std::vector<int> threads{1, 2, 3, 5};
    for (; std::fread(&length, sizeof length, 1, file) == 1; programs++) {
        std::vector<Index> numbers(length);
        if ((Index)std::fread(numbers.data(), sizeof(Index), length, file) != length) return 2;
        for (Index n : {1, 3, 16, 17, 33, 70}) {
            if (programs % 4 == 0) one_matrix<Double>(numbers.data(), n, threads);
            if (programs % 4 == 1) one_matrix<Single>(numbers.data(), n, threads);
            if (programs % 4 == 2) one_matrix<Brain>(numbers.data(), n, threads);
            if (programs % 4 == 3) one_matrix<Half>(numbers.data(), n, threads);
        }
        std::vector<Index> long_rows = dense(1029, 21);
        for (Index n : {1, 3, 7, 15, 33}) {
            const bool matrices = programs % 8 >= 4;
            if (programs % 4 == 0) quantized_factors<Double>(numbers.data(), matrices, n, threads);
            if (programs % 4 == 1) quantized_factors<Single>(numbers.data(), matrices, n, threads);
            if (programs % 4 == 2) quantized_factors<Brain>(numbers.data(), matrices, n, threads);
            if (programs % 4 == 3) quantized_factors<Single>(long_rows.data(), true, n, threads);
        }
        if (programs % 4 == 0) blocks<Double>(numbers.data(), 19, threads);
        if (programs % 4 == 1) blocks<Single>(numbers.data(), 35, threads);
        if (programs % 4 == 2) blocks<Brain>(numbers.data(), 35, threads);
        for (Index n : {5, 70}) {
            if (programs % 2) several_matrices<Single>(numbers.data(), n, threads);
            if (programs % 4 == 0) several_matrices<Brain>(numbers.data(), n, threads);
            if (programs % 4 == 2) several_matrices<Half>(numbers.data(), n, threads);
        }
    }
    std::fclose(file);
    std::printf("%ld programs\n", (long)programs);
}
