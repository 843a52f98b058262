// Vectors of LANES float32 numbers, whatever the size of the machine's registers.
#pragma once

#include "numbers.h"

constexpr int64_t LANES = 16;

// Numbers in a register, and the number of registers. Compilers keep vectors of this size in registers; they
// move larger ones through memory, which made attention 4 times slower on machines with AVX2.
#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int64_t WIDTH = 8, REGISTERS = 16;
#elif defined(__ARM_NEON)
constexpr int64_t WIDTH = 4, REGISTERS = 32;
#else
constexpr int64_t WIDTH = 4, REGISTERS = 16;
#endif
constexpr int PARTS = LANES / WIDTH;

typedef float Register __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

struct Vector {
    Register part[PARTS];
};

inline Register load_register(const float* from) {
    Register x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline Register load_register(const bfloat16* from) {
    Halves bits;
    std::memcpy(&bits, from, sizeof bits);
    return (Register)(__builtin_convertvector(bits, Bits) << 16);
}

template <class Number>
inline Vector load(const Number* from) {
    Vector x;
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) x.part[p] = load_register(from + p * WIDTH);
    return x;
}

inline void store(float* to, const Vector& x) { std::memcpy(to, &x, sizeof x); }

inline Vector operator+(Vector x, const Vector& y) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) x.part[p] += y.part[p];
    return x;
}

// sum += factor * x
inline void add_product(Vector& sum, float factor, const Vector& x) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) sum.part[p] += factor * x.part[p];
}
