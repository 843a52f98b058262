// Products of packed weights in bfloat16 on the matrix units of x86 processors (AMX).

#include "products.h"

#ifdef TILE_PRODUCTS
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// A tile of x has 16 rows of 32 entries. A tile of the weight has 32 entries of 16 columns.
constexpr int64_t ROWS = 16, DEPTH = 32;
static_assert(PANEL == 16 && GROUP == 2, "a packed weight consists of such tiles");

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {0};
    uint16_t row_bytes[16];
    uint8_t rows[16];
    TileShapes() {
        for (int i = 0; i < 16; ++i) row_bytes[i] = i < 8 ? 64 : 0, rows[i] = i < 8 ? ROWS : 0;
    }
};

// Compute 2 x 2 tiles of the result, so that four loads feed four products.
//
// x has 32 rows of `depth` entries, `weight` has two panels of depth * 16 entries each, and `to` is 32 x 32.
// Each step in depth also prefetches `lines` cache lines from `ahead`, which points to the next weights,
// because the hardware prefetcher does not find them by itself.
inline void two_by_two(const T* x, const T* weight, int64_t depth, float* to, const char* ahead,
                       int64_t lines) {
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

int can_multiply_packed() {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

void multiply_packed(const T* x, const T* weight, const float* bias, float* wide_to, T* to, int64_t n,
                     int64_t columns, int64_t depth) {
    constexpr int64_t ROWS_AT_ONCE = 256;  // this many rows of x stay in a core's cache
    const TileShapes shapes;
    std::vector<T> last(n % 32 ? 32 * depth : 0);  // the rows that do not fill a tile, padded with zeros
    std::copy(x + n / 32 * 32 * depth, x + n * depth, last.begin());
#pragma omp parallel
    {
        _tile_loadconfig(&shapes);
        alignas(64) float result[32 * 32];
        for (int64_t first = 0; first < n; first += ROWS_AT_ONCE) {
            const int64_t stop = std::min(first + ROWS_AT_ONCE, n);
            // A step in depth reads 32 cache lines of weights. The row tiles share the work of prefetching
            // them.
            const int64_t lines = std::max<int64_t>(1, 32 / ((stop - first + 31) / 32));
#pragma omp for schedule(static) nowait
            for (int64_t c = 0; c < columns; c += 32)
                for (int64_t i = first; i < stop; i += 32) {
                    const int64_t before = (i - first) / 32 * lines;
                    const T* ahead = weight + (c + 32) * depth + before * depth;
                    two_by_two(i + 32 > n ? last.data() : x + i * depth, weight + c * depth, depth, result,
                               reinterpret_cast<const char*>(ahead),
                               c + 32 < columns && before < 32 ? lines : 0);
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

#endif
