// The program: a structure as an array of int64, written by cpu_backend.py.
//
// A step multiplies a factor (batch, new, contracted) with an input (batch, free, contracted): it sums over the
// contracted axes and leaves an output (batch, free, new). Step k multiplies factor k.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "multiply.h"

namespace {

// The input or the output of a step: offsets of the rows that a product reads or writes. Its features are the
// contracted ones of an input, the new ones of an output.
struct Side {
    const Index *batch, *free, *feature;
    // width: rows of all products; stride: between features, 0 where that is not always the same
    Index features, width, stride;
    bool is_run() const { return stride == 1; }
};

struct Step {
    // begins, ends: whether it is the first or the last step of its term
    Index term, begins, ends, batch_size, free_size;
    Side in, out;
    // offsets into the factor, and the strides of two of them
    const Index *w_batch, *w_new, *w_contracted;
    Index w_new_stride, w_contracted_stride;
    // matrix-vector products for each token, and entries of the factor
    Index products() const { return batch_size * free_size; }
    Index entries() const { return batch_size * out.features * in.features; }
    bool has_strides() const { return w_new_stride && w_contracted_stride; }
};

// What a core keeps in cache: the cost model (CACHED in ops/cost_model.py) was fitted to timings made with this number.
constexpr Index HEAVY_ENTRIES = 1 << 18, HEAVY_RATIO = 128;

struct Program {
    Index terms, in_features, out_features;
    std::vector<Step> steps;
    // rows of inputs, of outputs, of the widest step and of all intermediates; entries of all factors
    Index width_in = 0, width_out = 0, widest = 0, intermediates = 0, factor_entries = 0;

    explicit Program(const Index* p) : terms(p[1]), in_features(p[2]), out_features(p[3]), steps(p[0]) {
        p += 4;
        for (Step& s : steps) {
            for (Index* number :
                 {&s.term, &s.begins, &s.ends, &s.batch_size, &s.free_size, &s.out.features, &s.in.features,
                  &s.in.width, &s.out.width, &s.in.stride, &s.out.stride, &s.w_new_stride, &s.w_contracted_stride})
                *number = *p++;
            const std::pair<const Index**, Index> tables[] = {
                {&s.in.batch, s.batch_size},  {&s.in.free, s.free_size},  {&s.in.feature, s.in.features},
                {&s.out.batch, s.batch_size}, {&s.out.free, s.free_size}, {&s.out.feature, s.out.features},
                {&s.w_batch, s.batch_size},   {&s.w_new, s.out.features}, {&s.w_contracted, s.in.features},
            };
            for (auto& [table, length] : tables) *table = p, p += length;
            widest = std::max({widest, s.in.width, s.out.width});
            if (s.begins) width_in = std::max(width_in, s.in.width);
            if (s.ends) width_out = std::max(width_out, s.out.width);
            intermediates += s.ends ? 0 : s.out.width;
            factor_entries += s.entries();
        }
    }
    // Whether the factors, and not the intermediates, are what does not stay in cache.
    bool is_heavy() const {
        return factor_entries > HEAVY_ENTRIES && factor_entries > HEAVY_RATIO * (width_in + intermediates + width_out);
    }
};

}  // namespace
