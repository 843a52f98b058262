// Products of packed weights on vector units. An entry of the result is the sum of its products in order,
// starting with the bias. It therefore does not depend on the other rows or on the number of threads, and it
// is the same in sampling and in training.

#include "products.h"
#include "vectors.h"

#ifdef VECTOR_PRODUCTS

// Entries that share a lane: a row of x and a column of a weight consist of groups.
#ifdef BFLOAT16
#include <immintrin.h>

struct Group {
    int32_t bits;
};

inline Vector load(const Group* from) {
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// sum += the products of both entries
inline void add_product(Vector& sum, Group factor, const Vector& x) {
    const __m512i factors = _mm512_set1_epi32(factor.bits);
    sum.part[0] = _mm512_dpbf16_ps(sum.part[0], (__m512bh)factors, (__m512bh)x.part[0]);
}
#else
using Group = float;
#endif

namespace {

// A panel of a weight has a vector for each group. The result is computed in tiles of ROWS rows and PANELS
// panels, whose sums take most of the registers.
static_assert(PANEL == LANES, "a vector has an entry of every column");
constexpr int PANELS = WIDTH == 16 ? 2 : 1;
constexpr int WIDE = PANELS * LANES;
constexpr int ROWS = REGISTERS * 3 / 4 / (PARTS * PANELS);
constexpr int64_t DEPTH = 288;      // groups of a column at a time: 18 KB per panel, for the fastest cache
constexpr int64_t BLOCK = 1 << 16;  // groups of x at a time: 256 KB, which fit in the second cache
constexpr int64_t STEP = 8;         // groups of a column between prefetches

// What add_tile multiplies: x, the panels, and where the tile's sums go.
struct Tile {
    const Group *x, *panels;
    const float* bias;  // (WIDE), with which the sums begin; null if `to` already holds sums
    float* to;
    int64_t x_stride, panel_stride, to_stride;  // between rows of x, panels, and rows of `to`
    const Group* ahead;                         // what to prefetch from every panel
    int64_t lines;                              // cache lines to prefetch in every STEP
};

// Add R rows of x (depth) times the panels (depth, LANES) to the sums.
template <int R>
void add_tile(Tile t, int64_t depth) {
    Vector sums[R][PANELS];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < PANELS; ++p)
            sums[r][p] = load((t.bias ? t.bias : t.to + r * t.to_stride) + p * LANES);
    const auto add = [&](int64_t k) __attribute__((always_inline)) {
        Vector weights[PANELS];
        for (int p = 0; p < PANELS; ++p) weights[p] = load(t.panels + p * t.panel_stride + k * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            for (int p = 0; p < PANELS; ++p) add_product(sums[r][p], t.x[r * t.x_stride + k], weights[p]);
    };
    int64_t k = 0;
    for (; k + STEP <= depth; k += STEP) {
        for (int64_t l = 0; l < t.lines; ++l, t.ahead += LANES)
            for (int p = 0; p < PANELS; ++p) __builtin_prefetch(t.ahead + p * t.panel_stride, 0, 2);
#pragma GCC unroll 16
        for (int j = 0; j < STEP; ++j) add(k + j);
    }
    for (; k < depth; ++k) add(k);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < PANELS; ++p) store(t.to + r * t.to_stride + p * LANES, sums[r][p]);
}

// add_tile with R = `rows`, which is known only at run time.
template <int R = 1>
void add_tile_of(int64_t rows, const Tile& tile, int64_t depth) {
    if (rows == R)
        add_tile<R>(tile, depth);
    else if constexpr (R < ROWS)
        add_tile_of<R + 1>(rows, tile, depth);
}

// x (n, depth) times PANELS panels -> WIDE columns of `to`, whose rows are `stride` apart. What follows the
// panels in memory is prefetched, unless they are the last.
void multiply_panels(const Group* x, const Group* panels, const float* bias, float* to, int64_t stride,
                     int64_t n, int64_t depth, bool are_last) {
    const int64_t tiles = (n + ROWS - 1) / ROWS, size = depth * LANES;  // tiles have nearly the same size
    for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t count = std::min(DEPTH, depth - k);
        const bool at_end = k + count == depth;
        const Group* ahead = panels + (at_end ? PANELS * size : (k + count) * LANES);
        const int64_t lines = at_end && are_last ? 0 : (STEP + tiles - 1) / tiles;  // tiles share this work
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = t * n / tiles, rows = (t + 1) * n / tiles - first;
            const Tile tile = {x + first * depth + k, panels + k * LANES, k ? nullptr : bias,
                               to + first * stride, depth, size, stride,
                               ahead + t * (count / STEP) * lines * LANES, lines};
            add_tile_of(rows, tile, count);
        }
    }
}

}  // namespace

int can_multiply_packed() { return 1; }

void multiply_packed(const T* x, const T* weight, const float* bias, float* wide_to, T* to, int64_t n,
                     int64_t columns, int64_t depth) {
    const int64_t parts = columns / WIDE, threads = omp_get_max_threads(), length = depth / GROUP;
    const int64_t rows = std::clamp(BLOCK / length / ROWS, int64_t(1), int64_t(64)) * ROWS;
    const int64_t blocks = (n + rows - 1) / rows;
    // The threads share the blocks of rows, and the columns too if there are few blocks. A thread that has to
    // share its core with another program takes fewer of these parts.
    const int64_t groups = blocks >= 4 * threads ? 1 : std::min(parts, 4 * threads);
    const float zeros[WIDE] = {0};
#pragma omp parallel
    {
        std::vector<float> sums(wide_to ? 0 : rows * WIDE);  // of a block, before they are rounded
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t b = 0; b < blocks; ++b)
            for (int64_t g = 0; g < groups; ++g)
                for (int64_t p = g * parts / groups; p < (g + 1) * parts / groups; ++p) {
                    const int64_t first = b * rows, count = std::min(rows, n - first);
                    const int64_t place = first * columns + p * WIDE;
                    multiply_panels(reinterpret_cast<const Group*>(x + first * depth),
                                    reinterpret_cast<const Group*>(weight + p * WIDE * depth),
                                    bias ? bias + p * WIDE : zeros, wide_to ? wide_to + place : sums.data(),
                                    wide_to ? columns : WIDE, count, length, p + 1 == parts);
                    if (!wide_to)
                        for (int64_t r = 0; r < count; ++r)
#pragma omp simd
                            for (int64_t j = 0; j < WIDE; ++j)
                                to[place + r * columns + j] = narrow(sums[r * WIDE + j]);
                }
    }
}

#endif
