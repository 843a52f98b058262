// float32 matrix products with a weight that is laid out in advance, for models that compute in float32. A
// decode step spends its time reading weights, and libraries lay them out again in every call. An entry of
// the result is the sum of its products in order, starting with the bias. It therefore does not depend on
// the other rows or on the number of threads, and it is the same in sampling and in training.

#ifndef BFLOAT16

#include "vectors.h"

namespace {

// A weight is stored as panels (columns / LANES, depth, LANES). The result is computed in tiles of ROWS rows
// and PANELS panels, whose sums take most of the registers.
constexpr int PANELS = WIDTH == 16 ? 2 : 1;
constexpr int ROWS = REGISTERS * 3 / 4 / (PARTS * PANELS);
constexpr int64_t DEPTH = 288;      // entries of a column at a time: 18 KB per panel, for the fastest cache
constexpr int64_t BLOCK = 1 << 16;  // entries of x at a time: 256 KB, which fit in the second cache
constexpr int64_t STEP = 8;         // entries of a column between prefetches

// What add_tile multiplies: x, the panels, and where the tile's sums go.
struct Tile {
    const float *x, *panels;
    const float* bias;  // (PANELS x LANES), with which the sums begin; null if `to` already holds sums
    float* to;
    int64_t x_stride, panel_stride, to_stride;  // between rows of x, panels, and rows of `to`
    const float* ahead;                         // what to prefetch from every panel
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

// x (n, depth) times PANELS panels -> as many columns of `to` (n, columns). What follows the panels in memory
// is prefetched, unless they are the last.
void multiply_panels(const float* x, const float* panels, const float* bias, float* to, int64_t n,
                     int64_t columns, int64_t depth, bool are_last) {
    const int64_t tiles = (n + ROWS - 1) / ROWS, size = depth * LANES;  // tiles have nearly the same size
    for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t count = std::min(DEPTH, depth - k);
        const bool at_end = k + count == depth;
        const float* ahead = panels + (at_end ? PANELS * size : (k + count) * LANES);
        const int64_t lines = at_end && are_last ? 0 : (STEP + tiles - 1) / tiles;  // tiles share this work
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = t * n / tiles, rows = (t + 1) * n / tiles - first;
            const Tile tile = {x + first * depth + k, panels + k * LANES, k ? nullptr : bias,
                               to + first * columns, depth, size, columns,
                               ahead + t * (count / STEP) * lines * LANES, lines};
            add_tile_of(rows, tile, count);
        }
    }
}

}  // namespace

extern "C" {

// Weight -> panels, the order in which they are read. The weight is stored as (columns, depth), or as
// (depth, columns) if `transposed`. Columns are a multiple of 32.
void pack_weight(const float* weight, float* to, int64_t columns, int64_t depth, int64_t transposed) {
#pragma omp parallel for
    for (int64_t c = 0; c < columns; c += LANES)
        for (int64_t k = 0; k < depth; ++k)
            for (int64_t l = 0; l < LANES; ++l)
                to[c * depth + k * LANES + l] =
                    transposed ? weight[k * columns + c + l] : weight[(c + l) * depth + k];
}

// x (n, depth) times a packed weight, plus bias (columns) unless it is null -> to (n, columns).
void multiply_packed(const float* x, const float* weight, const float* bias, float* to, int64_t n,
                     int64_t columns, int64_t depth) {
    constexpr int64_t WIDE = PANELS * LANES;
    const int64_t parts = columns / WIDE, threads = omp_get_max_threads();
    const int64_t rows = std::max<int64_t>(ROWS, BLOCK / depth / ROWS * ROWS);
    const int64_t blocks = (n + rows - 1) / rows;
    // The threads share the blocks of rows, and the columns too if there are few blocks. A thread that has to
    // share its core with another program takes fewer of these parts.
    const int64_t groups = blocks >= 4 * threads ? 1 : std::min(parts, 4 * threads);
    const float zeros[WIDE] = {0};
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t p = g * parts / groups; p < (g + 1) * parts / groups; ++p)
                multiply_panels(x + b * rows * depth, weight + p * WIDE * depth,
                                bias ? bias + p * WIDE : zeros, to + b * rows * columns + p * WIDE,
                                std::min(rows, n - b * rows), columns, depth, p + 1 == parts);
}

}  // extern "C"

#endif
