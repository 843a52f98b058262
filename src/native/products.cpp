// Products of bfloat16 matrices on the matrix units of x86 (AMX) with a float32 result, weights laid out once: what a decode step
// is made of is reading its weights, and PyTorch gives such products as bfloat16 only.

#include "numbers.h"

#if defined(__AMX_BF16__) && defined(__linux__) && defined(BFLOAT16)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t ROWS = 16, DEPTH = 32;  // a tile of x is 16 rows of 32 entries, one of the weight 32 entries of 16 columns
constexpr int64_t TILE = ROWS * DEPTH;  // entries

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {0};
    uint16_t row_bytes[16];
    uint8_t rows[16];
    TileShapes() {
        for (int i = 0; i < 16; ++i) row_bytes[i] = i < 8 ? 64 : 0, rows[i] = i < 8 ? ROWS : 0;
    }
};

// Two by two tiles of the result at once: of four loads come four products.
// x: 32 rows of depth entries; weight: two panels of tiles, depth * 16 entries each; to: 32 rows of 32. Meanwhile `lines` cache
// lines for each step in depth are fetched from `ahead`, where the weights go on: the processor does not foresee them by itself.
inline void two_by_two(const T* x, const T* weight, int64_t depth, float* to, const char* ahead, int64_t lines) {
    const T *lower = x + ROWS * depth, *next = weight + depth * ROWS;
    const int64_t stride = depth * sizeof(T);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += DEPTH) {
        for (int64_t l = 0; l < lines; ++l, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
        _tile_loadd(4, x + k, stride);
        _tile_loadd(6, weight + k * ROWS, 64);
        _tile_loadd(7, next + k * ROWS, 64);
        _tile_loadd(5, lower + k, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, 32 * sizeof(float));
    _tile_stored(1, to + ROWS, 32 * sizeof(float));
    _tile_stored(2, to + 32 * ROWS, 32 * sizeof(float));
    _tile_stored(3, to + 32 * ROWS + ROWS, 32 * sizeof(float));
}

}  // namespace

extern "C" {

// Whether this process may use the matrix units; asks the system for them.
int matrix_units() {
    constexpr int ASK_FOR_FEATURE = 0x1023, TILE_DATA = 18;  // <asm/prctl.h>
    return syscall(SYS_arch_prctl, ASK_FOR_FEATURE, TILE_DATA) == 0;
}

// Weight (columns, depth) -> panels of 16 columns, each depth / 32 tiles in the order that the units read: of each pair of entries,
// the 16 columns.
void pack_weight(const T* weight, T* to, int64_t columns, int64_t depth) {
#pragma omp parallel for
    for (int64_t c = 0; c < columns; c += ROWS)
        for (int64_t k = 0; k < depth; k += 2)
            for (int64_t r = 0; r < ROWS; ++r)
                std::memcpy(to + c * depth + k * ROWS + r * 2, weight + (c + r) * depth + k, 2 * sizeof(T));
}

// x (n, depth) times a packed weight (columns, depth), columns and depth multiples of 32, plus `bias` (columns) float32, if any
// -> (n, columns), float32 in `wide_to` or rounded in `to`, whichever is given. A row's result does not depend on the others.
void product(const T* x, const T* weight, const float* bias, float* wide_to, T* to, int64_t n, int64_t columns, int64_t depth) {
    constexpr int64_t TOGETHER = 256;  // rows of x that stay in a core's cache
    const TileShapes shapes;
    std::vector<T> last(n % 32 ? 32 * depth : 0);  // rows that do not fill a tile, and zeros
    std::copy(x + n / 32 * 32 * depth, x + n * depth, last.begin());
#pragma omp parallel
    {
        _tile_loadconfig(&shapes);
        alignas(64) float result[32 * 32];
        for (int64_t first = 0; first < n; first += TOGETHER) {
            const int64_t stop = std::min(first + TOGETHER, n);
            const int64_t lines = std::max<int64_t>(1, 32 / ((stop - first + 31) / 32));  // of the 32 that a step in depth takes
#pragma omp for schedule(static) nowait
            for (int64_t c = 0; c < columns; c += 32)
                for (int64_t i = first; i < stop; i += 32) {
                    const int64_t before = (i - first) / 32 * lines;
                    const T* ahead = weight + (c + 32) * depth + before * depth;
                    two_by_two(i + 32 > n ? last.data() : x + i * depth, weight + c * depth, depth, result,
                               reinterpret_cast<const char*>(ahead), c + 32 < columns && before < 32 ? lines : 0);
                    for (int64_t r = 0; r < std::min<int64_t>(32, n - i); ++r) {
                        float* from = result + r * 32;
                        const int64_t place = (i + r) * columns + c;
                        if (bias)
#pragma omp simd
                            for (int64_t j = 0; j < 32; ++j) from[j] += bias[c + j];
                        if (wide_to)
                            std::memcpy(wide_to + place, from, 32 * sizeof(float));
                        else
#pragma omp simd
                            for (int64_t j = 0; j < 32; ++j) to[place + j] = narrow(from[j]);
                    }
                }
        }
        _tile_release();
    }
}

}  // extern "C"

#else

extern "C" int matrix_units() { return 0; }

#endif
