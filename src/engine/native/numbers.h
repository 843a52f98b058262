// Number formats and elementary functions for all kernels. T is the model's compute dtype, chosen at compile
// time (bfloat16 with -DBFLOAT16, otherwise float). Sums, means and exponentials are float32, and each result
// is rounded to T once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

// Apple's compiler supports OpenMP but has no omp.h. Without OpenMP, there is only one thread.
#ifdef _OPENMP
extern "C" int omp_get_max_threads();
extern "C" int omp_get_thread_num();
#else
inline int omp_get_max_threads() { return 1; }
inline int omp_get_thread_num() { return 0; }
#endif

struct bfloat16 {
    uint16_t bits;
};

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float wide(float x) { return x; }
inline float wide(bfloat16 x) { return as_float(uint32_t(x.bits) << 16); }

#ifdef BFLOAT16
using T = bfloat16;
inline T narrow(float x) {  // rounds to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {uint16_t(x != x ? 0x7fc0 : rounded)};
}
#else
using T = float;
inline T narrow(float x) { return x; }
#endif

// e^x, accurate to 2 units in the last place, as 2^k (1 + r + ...) with |r| < ln 2 / 2. It uses only plain
// arithmetic, so the compiler can vectorize loops over it. Below -87 the result is 0.
inline float fast_exp(float x) {
    const float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float k = std::nearbyint(clamped * 1.44269504f);
    float r = clamped - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665795e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    p *= as_float(uint32_t(int32_t(k) + 127) << 23);
    return x < -87.0f ? 0.0f : p;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// Rotary embedding of one head: x cos + (x with its halves swapped) sin, rounded to T. `sin` already contains
// the minus sign of rotate_half. The explicit fma makes the result bit-identical wherever this is inlined.
// `to` may be x.
inline void rotate_head(const T* x, const float* cos, const float* sin, int64_t head_dim, T* to) {
    const int64_t half = head_dim / 2;
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
        const float front = wide(x[j]), back = wide(x[j + half]);
        to[j] = narrow(std::fma(front, cos[j], back * sin[j]));
        to[j + half] = narrow(std::fma(back, cos[j + half], front * sin[j + half]));
    }
}
