// Vectors of the machine at hand, and memory for them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#ifdef __linux__
#include <sys/mman.h>
#endif
#if defined(__AVX__)
#include <immintrin.h>
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

// a > b ? a : b, which is b if one of them is a NaN; and a < b ? a : b. Compilers take two instructions for a choice.
template <class V>
static inline V maximum(V a, V b) {
    return a > b ? a : b;
}
template <class V>
static inline V minimum(V a, V b) {
    return a < b ? a : b;
}
#if defined(__AVX512F__)
template <>
inline Vec<float> maximum(Vec<float> a, Vec<float> b) {
    return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
}
template <>
inline Vec<float> minimum(Vec<float> a, Vec<float> b) {
    return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b);
}
#elif defined(__AVX__)
template <>
inline Vec<float> maximum(Vec<float> a, Vec<float> b) {
    return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
}
template <>
inline Vec<float> minimum(Vec<float> a, Vec<float> b) {
    return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b);
}
#endif

// Compilers read from memory what they use several times, if an instruction can do both; that takes as many loads.
template <class V>
static inline void keep_in_register(V& v) {
#if defined(__x86_64__)
    __asm__("" : "+x"(v));
#elif defined(__aarch64__)
    __asm__("" : "+w"(v));
#else
    (void)v;
#endif
}

// Half precision exists in memory only: numbers are widened when they are loaded and rounded when they are stored.
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// The upper half of a float32.
struct BFloat16 {
    uint16_t bits;
    BFloat16() = default;
    BFloat16(float value) {
        uint32_t b = bits_of(value);
        bits = value != value ? (b >> 16) | 0x40 : (b + 0x7fff + (b >> 16 & 1)) >> 16;
    }
    operator float() const { return float_of((uint32_t)bits << 16); }
};
static inline Vec<float> load(const BFloat16* p) {
    return (Vec<float>)(__builtin_convertvector(*(const Halves*)p, Words) << 16);
}
static inline void store(BFloat16* p, Vec<float> v) {
    Words b = (Words)v, rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
    // a NaN stays one
    Words nan = (Words)(v != v);
    *(Halves*)p = __builtin_convertvector((nan & (b >> 16 | 0x40)) | (~nan & rounded), Halves);
}

// IEEE half precision: 5 bits of exponent, 10 of mantissa.
struct Float16 {
    uint16_t bits;
    Float16() = default;
    Float16(float value) {
        // Round to the mantissa's end, which lies higher for numbers below 2^-14, by adding a number that pushes the
        // rest out.
        uint32_t b = bits_of(value), sign = b >> 16 & 0x8000, size = b & 0x7fffffff;
        if (size > 0x7f800000)
            bits = sign | 0x7e00 | (size >> 13 & 0x3ff);
        else if (size >= 0x477ff000)
            bits = sign | 0x7c00;
        else if (size < 0x38800000)
            bits = sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000);
        else
            bits = sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
    }
    operator float() const {
        uint32_t sign = (uint32_t)(bits & 0x8000) << 16, size = (uint32_t)(bits & 0x7fff) << 13;
        // 2^112 moves the exponent to where float32 has it; infinities and NaNs have the largest
        uint32_t b = size >= 0x7c00 << 13 ? size | 0x7f800000 : bits_of(float_of(size) * 0x1p112f);
        return float_of(sign | b);
    }
};
static inline Vec<float> load(const Float16* p) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    Vec<float> v;
    for (int l = 0; l < Simd<float>::lanes; l++) v[l] = p[l];
    return v;
#endif
}
static inline void store(Float16* p, Vec<float> v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int l = 0; l < Simd<float>::lanes; l++) p[l] = v[l];
#endif
}

// As many bytes as a vector has lanes of float32.
typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
static inline Integers load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
    return (Integers)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
    return (Integers)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    Integers v;
    for (int l = 0; l < Simd<float>::lanes; l++) v[l] = p[l];
    return v;
#endif
}

// The type of arithmetic on numbers of type T in memory.
template <class T>
struct ArithmeticOf {
    typedef T type;
};
template <>
struct ArithmeticOf<BFloat16> {
    typedef float type;
};
template <>
struct ArithmeticOf<Float16> {
    typedef float type;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;
template <class T>
constexpr bool widens = !std::is_same_v<T, Arithmetic<T>>;

template <class S, class T>
static S dot(const S* a, const T* b, Index count) {
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

// Entries [first, last) of an array to another of any type.
template <class From, class To>
static void convert(const From* from, To* to, Index first, Index last) {
    using S = Arithmetic<From>;
    constexpr Index L = Simd<S>::lanes;
    for (; first + L <= last; first += L) store(to + first, load(from + first));
    for (; first < last; first++) to[first] = (S)from[first];
}

// An array in the type of arithmetic: itself, or a copy. Null stays null.
template <class T>
struct Widened {
    Buffer<Arithmetic<T>> memory;
    const Arithmetic<T>* data;
    Widened(const T* from, Index count) : memory(widens<T> && from ? count : 0) {
        data = widens<T> && from ? memory.data : (const Arithmetic<T>*)from;
        if (widens<T> && from) convert(from, memory.data, 0, count);
    }
};

// Fresh memory of many megabytes is mapped page by page as it is written, which costs as much as the arithmetic: ask
// for large pages. Memory that is mapped already is not affected.
static void advise_huge_pages(const void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 2 << 20;
    uintptr_t first = ((uintptr_t)data + page - 1) & ~(page - 1), last = ((uintptr_t)data + bytes) & ~(page - 1);
    if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace
