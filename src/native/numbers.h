// The numbers that all kernels compute with. T is what the model computes in, chosen at compile time (-DBFLOAT16 or float); sums,
// means and exponentials are float32, and a result is rounded to T once.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

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
inline T narrow(float x) {  // to the nearest, ties to even; nan stays nan
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {uint16_t(x != x ? 0x7fc0 : rounded)};
}
#else
using T = float;
inline T narrow(float x) { return x; }
#endif

// e^x to 2 units in the last place: 2^k (1 + r + ...), |r| < ln 2 / 2. In plain arithmetic, so that loops of it become vectors.
// Below -87 it is 0.
inline float fast_exp(float x) {
    const float held = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float k = std::nearbyint(held * 1.44269504f);
    float r = held - k * 0.693359375f + k * 2.12194440e-4f;
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

// Rotary embedding of a head (e): x cos + (halves exchanged) sin, the sine with the sign of rotate_half; rounded to T. Written as
// fused operations, so that it has the same bits wherever it is compiled into; `to` may be x.
inline void rotate_head(const T* x, const float* cos, const float* sin, int64_t e, T* to) {
    const int64_t half = e / 2;
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
        const float front = wide(x[j]), back = wide(x[j + half]);
        to[j] = narrow(std::fma(front, cos[j], back * sin[j]));
        to[j + half] = narrow(std::fma(back, cos[j + half], front * sin[j + half]));
    }
}
