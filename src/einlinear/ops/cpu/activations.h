// Activation functions, and their slopes.
//
// In float32 they are rational approximations, of an error of a few units in the last place, on whole vectors. In
// float64 they are those of the C library.
#pragma once

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace {

// In the order of ACTIVATIONS in ops/activation_functions.py.
enum Activation : Index { IDENTITY, RELU, RELU_SQUARED, GELU, GELU_TANH, QUICK_GELU, SILU, SIGMOID, TANH };

// NaNs stay what they are: comparisons with them are false.
template <class S>
static inline Vec<S> clamp(Vec<S> x, S low, S high) {
    return minimum(Vec<S>{} + high, maximum(Vec<S>{} + low, x));
}

// c[0] + c[1] s + c[2] s^2 + ...
template <int N>
static inline Vec<float> polynomial(const float (&c)[N], Vec<float> s) {
    Vec<float> sum = Vec<float>{} + c[N - 1];
#pragma GCC unroll 16
    for (int i = N - 2; i >= 0; i--) sum = sum * s + c[i];
    return sum;
}

static inline Vec<float> exp(Vec<float> x) {
    // e^x = 2^n e^r with |r| <= ln(2) / 2; 2^128 is infinity. Adding ROUND leaves no room for a fraction.
    constexpr float ROUND = 0x1.8p23f, TERMS[] = {1, 1, 1 / 2.f, 1 / 6.f, 1 / 24.f, 1 / 120.f, 1 / 720.f};
    x = clamp(x, -87.f, 88.9f);
    Vec<float> shifted = x * 1.44269504f + ROUND, n = shifted - ROUND;
    Vec<float> r = x - n * 0.693145752f - n * 1.42860677e-6f;
    return polynomial(TERMS, r) * (Vec<float>)(((Words)shifted + 127) << 23);
}
static inline Vec<float> erf(Vec<float> x) {
    constexpr float P[] = {1.12837915f, 0.190407377f, 0.0527488454f, 0.00376565655f, 0.000284883726f, 2.05008183e-6f};
    constexpr float Q[] = {1, 0.502076885f, 0.11410949f, 0.0149692957f, 0.00116254532f, 3.80917105e-5f};
    // where the quotient is beyond 1, so that the result is 1 for all larger x: of these it multiplies any in gelu
    x = clamp(x, -4.05f, 4.05f);
    Vec<float> s = x * x;
    return clamp(x * polynomial(P, s) / polynomial(Q, s), -1.f, 1.f);
}
static inline Vec<float> tanh(Vec<float> x) {
    constexpr float P[] = {1, 0.133810258f, 0.00349558836f, 2.06090866e-5f, 1.33546682e-8f};
    constexpr float Q[] = {1, 0.467143414f, 0.025876983f, 0.000328563522f, 7.7765609e-7f};
    x = clamp(x, -9.6f, 9.6f);
    Vec<float> s = x * x;
    return clamp(x * polynomial(P, s) / polynomial(Q, s), -1.f, 1.f);
}

#define EACH_LANE(name)                                                                 \
    static inline Vec<double> name(Vec<double> x) {                                     \
        for (int l = 0; l < Simd<double>::lanes; l++) x[l] = std::name(x[l]);           \
        return x;                                                                       \
    }
EACH_LANE(exp)
EACH_LANE(erf)
EACH_LANE(tanh)
#undef EACH_LANE

template <class V>
static inline V sigmoid(V x) {
    return 1 / (1 + exp(-x));
}

// An activation at x, and its slope there.
template <class V>
struct Activated {
    V value, slope;
};
template <Activation A, class S, class V = Vec<S>>
static inline Activated<V> activate(V x) {
    const V one = V{} + S(1), zero{};
    if constexpr (A == IDENTITY) return {x, one};
    // like those of torch, they pass on a NaN
    if constexpr (A == RELU) return {x < zero ? zero : x, x <= zero ? zero : one};
    if constexpr (A == RELU_SQUARED) {
        V r = x < zero ? zero : x;
        return {r * r, r + r};
    }
    if constexpr (A == GELU) {
        // x times the probability that a normal variable is below x; the slope adds x times its density
        V below = S(0.5) + S(0.5) * erf(x * S(M_SQRT1_2));
        return {x * below, below + x * (S(0.5 * M_SQRT1_2 * M_2_SQRTPI) * exp(x * x * S(-0.5)))};
    }
    if constexpr (A == GELU_TANH) {
        // (1 + tanh(u)) / 2 is the sigmoid of 2 u
        constexpr S scale = 2 * M_SQRT1_2 * M_2_SQRTPI, cubic = 0.044715;
        V s = sigmoid(scale * (x + cubic * x * x * x));
        return {x * s, s + x * s * (1 - s) * (scale * (1 + 3 * cubic * x * x))};
    }
    if constexpr (A == SILU || A == QUICK_GELU) {
        constexpr S scale = A == SILU ? 1 : 1.702;
        V s = sigmoid(scale * x);
        return {x * s, s + scale * x * s * (1 - s)};
    }
    if constexpr (A == SIGMOID) {
        V s = sigmoid(x);
        return {s, s * (1 - s)};
    }
    if constexpr (A == TANH) {
        V t = tanh(x);
        return {t, 1 - t * t};
    }
}

// Call `work` with the activation as a constant.
template <class Work>
static void with_activation(Index activation, Work work) {
    switch (activation) {
        case IDENTITY: return work(std::integral_constant<Activation, IDENTITY>());
        case RELU: return work(std::integral_constant<Activation, RELU>());
        case RELU_SQUARED: return work(std::integral_constant<Activation, RELU_SQUARED>());
        case GELU: return work(std::integral_constant<Activation, GELU>());
        case GELU_TANH: return work(std::integral_constant<Activation, GELU_TANH>());
        case QUICK_GELU: return work(std::integral_constant<Activation, QUICK_GELU>());
        case SILU: return work(std::integral_constant<Activation, SILU>());
        case SIGMOID: return work(std::integral_constant<Activation, SIGMOID>());
        case TANH: return work(std::integral_constant<Activation, TANH>());
    }
}

}  // namespace
