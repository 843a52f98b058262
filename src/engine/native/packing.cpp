#include "products.h"

#if defined(TILE_PRODUCTS) || defined(VECTOR_PRODUCTS)

void pack_weight(const T* weight, T* to, int64_t columns, int64_t depth, int64_t transposed) {
    const int64_t next_column = transposed ? 1 : depth, next_entry = transposed ? columns : 1;
#pragma omp parallel for
    for (int64_t c = 0; c < columns; c += PANEL)
        for (int64_t k = 0; k < depth; k += GROUP)
            for (int64_t j = 0; j < PANEL; ++j)
                for (int64_t g = 0; g < GROUP; ++g)
                    to[c * depth + k * PANEL + j * GROUP + g] =
                        weight[(c + j) * next_column + (k + g) * next_entry];
}

#else

int can_multiply_packed() { return 0; }

#endif
