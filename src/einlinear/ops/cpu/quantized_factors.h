// Factors that are stored in few bits: a piece of a matrix is expanded where it is used, to memory that stays in cache.
#pragma once

#include <algorithm>
#include <numeric>

#include "packing.h"

namespace {

// Codes of 2 to 8 bits as integer_format.py packs them, row by row of the matrices (batch, new, contracted), each times
// the scale of its group of columns; or numbers of bfloat16, which have 16 bits and lie as the program says.
struct QuantizedFactor {
    const void* data;
    const BFloat16* scales;
    // columns of a group; groups and bytes of a row
    Index bits, group, groups, row_bytes;
};

// Columns that are expanded at a time: codes begin at whole bytes, and a few rows of numbers stay in the first cache.
constexpr Index CHUNK = 512;
// numbers from one row of these to the next: a little more than a power of 2, which caches do not like
constexpr Index EXPANDED_LD = CHUNK + 16;

// Add parts of `Width` bits, the first ones of bytes, to `count` codes, shifted.
template <int Width>
static void unpack_part(const uint8_t* bytes, Index count, int shift, uint8_t* codes) {
    constexpr Index PARTS = 8 / Width, MASK = (1 << Width) - 1;
    Index k = 0;
    for (; k + PARTS <= count; k += PARTS, bytes++)
#pragma GCC unroll 8
        for (int i = 0; i < PARTS; i++) codes[k + i] |= (*bytes >> i * Width & MASK) << shift;
    for (int i = 0; k < count; k++, i += Width) codes[k] |= (*bytes >> i & MASK) << shift;
}
// Codes [first, first + count) of a row of `columns`, shifted to be positive: where they lie, or in `room`.
static const uint8_t* unpack(const QuantizedFactor& f, const uint8_t* row, Index columns, Index first, Index count,
                             uint8_t* room) {
    if (f.bits == 8) return row + first;
    std::fill_n(room, count, 0);
    // the parts of all columns follow one another in a row
    int shift = 0;
    auto add_part = [&](auto width) {
        constexpr int W = decltype(width)::value;
        if (!(f.bits & W)) return;
        unpack_part<W>(row + first * W / 8, count, shift, room);
        row += (columns * W + 7) / 8, shift += W;
    };
    add_part(Constant<4>()), add_part(Constant<2>()), add_part(Constant<1>());
    return room;
}

// Entries of matrix b of a factor, rows [first, first + count) and columns [start, start + width), at most CHUNK of
// them -> rows of `to_ld`.
template <class S>
static void expand(const Step& s, const QuantizedFactor& f, Index b, Index first, Index count, Index start, Index width,
                   S* to, Index to_ld) {
    if (f.bits == 16) {
        const BFloat16* from = (const BFloat16*)f.data + s.w_batch[b];
        const Index *row_at = s.w_new + first, *column_at = s.w_contracted + start;
        if constexpr (std::is_same_v<S, float>)
            if (s.w_new_stride == 1 && s.w_contracted_stride)
                return transpose(from + *row_at + *column_at, s.w_contracted_stride, to, to_ld, width, count);
        for (Index m = 0; m < count; m++, to += to_ld)
            if (s.w_contracted_stride == 1)
                for (Index k = 0; k < width; k++) to[k] = from[row_at[m] + *column_at + k];
            else
                for (Index k = 0; k < width; k++) to[k] = from[row_at[m] + column_at[k]];
        return;
    }
    constexpr Index L = Simd<S>::lanes;
    uint8_t room[CHUNK];
    const uint8_t* bytes = (const uint8_t*)f.data;
    const S zero = 1 << (f.bits - 1);
    for (Index m = 0; m < count; m++, to += to_ld) {
        Index row = (s.w_batch[b] + s.w_new[first + m]) / s.in.features;
        const uint8_t* codes = unpack(f, bytes + row * f.row_bytes, s.in.features, start, width, room);
        const BFloat16* scales = f.scales + row * f.groups;
        // those that most often follow are fetched from memory meanwhile
        Index end = start + width < s.in.features ? (start + width) * f.bits / 8 : count * f.row_bytes;
        for (Index i = 0; i < width * f.bits / 8; i += 64) __builtin_prefetch(bytes + row * f.row_bytes + end + i);
        Index group = start / f.group;
        for (Index k = 0; k < width; group++) {
            Index end = std::min(width, (group + 1) * f.group - start);
            const S scale = scales[group];
            if constexpr (std::is_same_v<S, float>)
                for (; k + L <= end; k += L) {
                    Vec<S> code = __builtin_convertvector(load_bytes(codes + k), Vec<S>);
                    store(to + k, (code - zero) * scale);
                }
            for (; k < end; k++) to[k] = (codes[k] - zero) * scale;
        }
    }
}

// Pack a share of a factor for its step, as `pack` in packing.h does, from rows that are expanded before.
template <class S>
static void pack(const Step& s, const QuantizedFactor& factor, S* to, Share mine) {
    const Index rows = s.out.features, contracted = s.in.features;
    alignas(64) S expanded[MICRO_ROWS * EXPANDED_LD];
    Index row_at[MICRO_ROWS], k_at[CHUNK];
    for (Index i = 0; i < MICRO_ROWS; i++) row_at[i] = i * EXPANDED_LD;
    std::iota(k_at, k_at + CHUNK, 0);
    for (Index b = mine.first(s.batch_size); b < mine.last(s.batch_size); b++)
        each_group<MICRO_ROWS>(rows, [&](auto constant, Index m) {
            constexpr Index group = decltype(constant)::value;
            S* packed = to + (b * rows + m) * contracted;
            for (Index k = 0; k < contracted; k += CHUNK) {
                Index width = std::min(CHUNK, contracted - k);
                expand(s, factor, b, m, group, k, width, expanded, EXPANDED_LD);
                pack_rows<group>(expanded, row_at, k_at, true, width, packed + k * group);
            }
        });
}

}  // namespace
