// Matrix products with a weight that is packed in advance, in the order in which a product reads it. A decode
// step spends its time reading weights, and libraries lay them out again in every call.
//
// T is the dtype of x and the weight. Sums are float32, and a result can stay float32, whereas PyTorch always
// rounds the results of bfloat16 products to bfloat16.
//
// - packing.cpp packs the weight.
// - tile_products.cpp multiplies bfloat16 on the matrix units of x86 processors (AMX).
// - vector_products.cpp multiplies float32 on any processor, and bfloat16 on x86 processors whose vector
//   units do (AVX512_BF16) and that have no matrix units.
#pragma once

#include "numbers.h"

#if defined(BFLOAT16) && defined(__AMX_BF16__) && defined(__linux__)
#define TILE_PRODUCTS
#elif !defined(BFLOAT16) || defined(__AVX512BF16__)
#define VECTOR_PRODUCTS
#endif

// Entries that a product multiplies and adds in a single 32-bit lane.
constexpr int64_t GROUP = 4 / sizeof(T);
constexpr int64_t PANEL = 16;  // columns of a weight that are packed together

extern "C" {

// Returns whether this process can multiply the packed weights of this library. It asks the operating system
// for the matrix units.
int can_multiply_packed();

// Weight -> panels (columns / PANEL, depth / GROUP, PANEL, GROUP). The weight is stored as (columns, depth),
// or as (depth, columns) if `transposed`. Columns are a multiple of 32, and so is the depth in bfloat16.
void pack_weight(const T* weight, T* to, int64_t columns, int64_t depth, int64_t transposed);

// x (n, depth) times a packed weight, plus `bias` (columns) unless it is null -> (n, columns), written either
// to `wide_to` in float32 or to `to`; the other pointer is null. A row's result depends on no other row.
void multiply_packed(const T* x, const T* weight, const float* bias, float* wide_to, T* to, int64_t n,
                     int64_t columns, int64_t depth);

}  // extern "C"
