// Vectors of the machine at hand, and memory for them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, MICRO_ROWS = 12;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, MICRO_ROWS = 6;
#else
constexpr int VECTOR_BYTES = 16, MICRO_ROWS = 8;
#endif

namespace {

using Index = int64_t;

template <class S>
struct Simd {
    typedef S type __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(S)), may_alias));
    static constexpr int lanes = VECTOR_BYTES / sizeof(S);
};
template <class S>
using Vec = typename Simd<S>::type;
template <class S>
static inline Vec<S> load(const S* p) {
    return *(const Vec<S>*)p;
}
template <class S>
static inline void store(S* p, Vec<S> v) {
    *(Vec<S>*)p = v;
}

template <class S>
static S dot(const S* a, const S* b, Index count) {
    constexpr Index L = Simd<S>::lanes;
    Vec<S> sum{};
    Index k = 0;
    for (; k + L <= count; k += L) sum += load(a + k) * load(b + k);
    S total = 0;
    for (Index l = 0; l < L; l++) total += sum[l];
    for (; k < count; k++) total += a[k] * b[k];
    return total;
}

// Aligned scratch memory, not initialised.
template <class S>
struct Buffer {
    std::unique_ptr<S[]> memory;
    S* data;
    explicit Buffer(size_t count) : memory(new S[count + 64]) {
        data = (S*)(((uintptr_t)memory.get() + 63) & ~(uintptr_t)63);
    }
};

// Fresh memory of many megabytes is mapped page by page as it is written, which costs as much as the arithmetic: ask
// for large pages. Memory that is mapped already is not affected.
static void expect(const void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 2 << 20;
    uintptr_t first = ((uintptr_t)data + page - 1) & ~(page - 1), last = ((uintptr_t)data + bytes) & ~(page - 1);
    if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace
