// The program: a structure as an array of int64, written by program.py.
//
// A step multiplies a factor (batch, new, contracted) with an input (batch, free, contracted): it sums over the
// contracted axes and leaves an output (batch, free, new). Offsets into inputs and outputs count rows of a tile,
// offsets into factors count entries.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

struct Step {
    Index factor;
    // the products of the sizes of a group's axes
    Index batch_size, free_size, new_size, contracted_size;
    // rows of the input and of the output
    Index width_in, width_out;
    const Index *in_batch, *in_free, *in_contracted;
    const Index *out_batch, *out_free, *out_new;
    const Index *w_batch, *w_new, *w_contracted;
    // between two entries of in_contracted, out_new, w_new and w_contracted; 0 where that is not always the same
    Index in_stride, out_stride, w_new_stride, w_contracted_stride;
    // matrix-vector products for each token, and entries of the factor
    Index products() const { return batch_size * free_size; }
    Index entries() const { return batch_size * new_size * contracted_size; }
};

static Index intermediate_rows(const std::vector<Step>& term) {
    Index total = 0;
    for (auto& s : term) total += &s == &term.back() ? 0 : s.width_out;
    return total;
}

// What a core keeps in cache: the cost model (CACHED in ops/costs.py) was fitted to timings made with this number.
constexpr Index HEAVY_ENTRIES = 1 << 18, HEAVY_RATIO = 128;

struct Program {
    Index in_features, out_features;
    std::vector<std::vector<Step>> terms;
    Index width_in = 0, width_out = 0, widest = 0;

    explicit Program(const Index* p) {
        Index count = *p++;
        in_features = *p++, out_features = *p++;
        for (Index i = 0; i < count; i++) {
            std::vector<Step> term(*p++);
            for (Step& s : term) {
                s.factor = *p++;
                s.batch_size = *p++, s.free_size = *p++, s.new_size = *p++, s.contracted_size = *p++;
                s.width_in = *p++, s.width_out = *p++;
                s.in_stride = *p++, s.out_stride = *p++, s.w_new_stride = *p++, s.w_contracted_stride = *p++;
                const std::pair<const Index**, Index> tables[] = {
                    {&s.in_batch, s.batch_size},   {&s.in_free, s.free_size},   {&s.in_contracted, s.contracted_size},
                    {&s.out_batch, s.batch_size},  {&s.out_free, s.free_size},  {&s.out_new, s.new_size},
                    {&s.w_batch, s.batch_size},    {&s.w_new, s.new_size},      {&s.w_contracted, s.contracted_size},
                };
                for (auto& [table, length] : tables) *table = p, p += length;
                widest = std::max({widest, s.width_in, s.width_out});
            }
            width_in = std::max(width_in, term.front().width_in);
            width_out = std::max(width_out, term.back().width_out);
            terms.push_back(std::move(term));
        }
    }
    const Step& first() const { return terms[0].front(); }
    const Step& last() const { return terms[0].back(); }
    // rows of all intermediates
    Index intermediates() const {
        Index total = 0;
        for (auto& term : terms) total += intermediate_rows(term);
        return total;
    }
    Index factor_entries() const {
        Index total = 0;
        for (auto& term : terms)
            for (auto& s : term) total += s.entries();
        return total;
    }
    // Whether the factors, and not the intermediates, are what does not stay in cache.
    bool heavy() const {
        Index entries = factor_entries();
        return entries > HEAVY_ENTRIES && entries > HEAVY_RATIO * (width_in + intermediates() + width_out);
    }
};

}  // namespace
