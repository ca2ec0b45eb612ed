// The program: a structure as an array of int64, written by program.py. Offsets of states count rows, offsets of
// factors count entries.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

struct Step {
    Index factor, batches, columns, rows, inner;  // counts of the step's matrix products and their sizes
    Index width_in, width_out;                    // rows of the states before and after
    // offsets: of batch, column and inner in the state before; of batch, column and row in the state after; of batch,
    // row and inner in the factor
    const Index *in_b, *in_c, *in_k, *out_b, *out_c, *out_r, *w_b, *w_r, *w_k;
    // what lies between two entries of in_k, out_r, w_r and w_k, or 0 where that is not always the same
    Index in_stride, out_stride, w_row, w_inner;
    Index pairs() const { return batches * columns; }
    Index entries() const { return batches * rows * inner; }  // of the factor
};

static Index term_states(const std::vector<Step>& term) {
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
                s.factor = *p++, s.batches = *p++, s.columns = *p++, s.rows = *p++, s.inner = *p++;
                s.width_in = *p++, s.width_out = *p++;
                s.in_stride = *p++, s.out_stride = *p++, s.w_row = *p++, s.w_inner = *p++;
                const Index** tables[] = {&s.in_b,  &s.in_c, &s.in_k, &s.out_b, &s.out_c,
                                          &s.out_r, &s.w_b,  &s.w_r,  &s.w_k};
                const Index lengths[] = {s.batches, s.columns, s.inner, s.batches, s.columns,
                                         s.rows,    s.batches, s.rows,  s.inner};
                for (int t = 0; t < 9; t++) *tables[t] = p, p += lengths[t];
                widest = std::max({widest, s.width_in, s.width_out});
            }
            width_in = std::max(width_in, term.front().width_in);
            width_out = std::max(width_out, term.back().width_out);
            terms.push_back(std::move(term));
        }
    }
    const Step& first() const { return terms[0].front(); }
    const Step& last() const { return terms[0].back(); }
    Index states() const {  // rows of all intermediate states
        Index total = 0;
        for (auto& term : terms) total += term_states(term);
        return total;
    }
    Index factor_entries() const {
        Index total = 0;
        for (auto& term : terms)
            for (auto& s : term) total += s.entries();
        return total;
    }
    // Whether it is the factors that do not stay in cache, and not the states.
    bool heavy() const {
        Index entries = factor_entries();
        return entries > HEAVY_ENTRIES && entries > HEAVY_RATIO * (width_in + states() + width_out);
    }
};

}  // namespace
