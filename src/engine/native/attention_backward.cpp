// The gradient of attention, without its matrix products, which PyTorch computes. These functions gather the
// operands of the products, scatter their results, and compute the softmax.

#include "block.h"

extern "C" {

static void copy_or_clear(T* to, const T* from, int64_t head_dim) {
    if (from)
        std::memcpy(to, from, head_dim * sizeof(T));
    else
        std::memset(to, 0, head_dim * sizeof(T));
}

// The query heads of x (tokens, all_heads, head_dim) -> (count, kv_heads, share x longest, head_dim), padded
// with zeros.
void gather_queries(const Block& b, const T* x, int64_t all_heads, T* to) {
#pragma omp parallel for collapse(2)
    for (int64_t q = 0; q < b.count; ++q)
        for (int64_t h = 0; h < b.heads; ++h)
            for (int64_t r = 0; r < b.longest; ++r) {
                const T* from =
                    r < b.lengths[q] ? x + ((b.starts[q] + r) * all_heads + h) * b.head_dim : nullptr;
                copy_or_clear(to + ((q * b.heads + h) * b.longest + r) * b.head_dim, from, b.head_dim);
            }
}

// The inverse of gather_queries: write the rows back to x (tokens, all_heads, head_dim).
void scatter_queries(const Block& b, const T* from, int64_t all_heads, T* x) {
#pragma omp parallel for collapse(2)
    for (int64_t q = 0; q < b.count; ++q)
        for (int64_t h = 0; h < b.heads; ++h)
            for (int64_t r = 0; r < b.lengths[q]; ++r)
                std::memcpy(x + ((b.starts[q] + r) * all_heads + h) * b.head_dim,
                            from + ((q * b.heads + h) * b.longest + r) * b.head_dim, b.head_dim * sizeof(T));
}

// qkv (tokens, heads + 2 kv_heads, head_dim) -> keys and values (count, kv_heads, padded_keys, head_dim),
// padded with zeros.
void gather_keys_values(const Block& b, const T* qkv, T* keys, T* values) {
#pragma omp parallel for collapse(2)
    for (int64_t q = 0; q < b.count; ++q)
        for (int64_t h = 0; h < b.kv_heads; ++h)
            for (int64_t r = 0; r < b.padded_keys; ++r) {
                const int64_t token = b.token(q, r);
                const int64_t to = ((q * b.kv_heads + h) * b.padded_keys + r) * b.head_dim;
                const T* key = qkv + (token * b.all_heads() + b.heads + h) * b.head_dim;
                copy_or_clear(keys + to, token < 0 ? nullptr : key, b.head_dim);
                copy_or_clear(values + to, token < 0 ? nullptr : key + b.kv_heads * b.head_dim, b.head_dim);
            }
}

// Write the gradients of keys and values to d_qkv. The rows of a sequence's own tokens are overwritten. The
// gradients of the prefix are summed over the sequences and added to the prefix's rows.
void scatter_keys_values(const Block& b, const T* d_keys, const T* d_values, T* d_qkv) {
#pragma omp parallel for collapse(2)
    for (int64_t h = 0; h < b.kv_heads; ++h)
        for (int64_t r = 0; r < b.prefix_length + b.longest; ++r)
            for (int is_value = 0; is_value < 2; ++is_value) {
                const T* from = (is_value ? d_values : d_keys) + (h * b.padded_keys + r) * b.head_dim;
                const int64_t stride =
                    b.kv_heads * b.padded_keys * b.head_dim;  // from one sequence to the next
                const int64_t head = b.heads + (is_value ? b.kv_heads : 0) + h;
                if (r >= b.prefix_length) {
                    for (int64_t q = 0; q < b.count; ++q)
                        if (b.token(q, r) >= 0)
                            std::memcpy(d_qkv + (b.token(q, r) * b.all_heads() + head) * b.head_dim,
                                        from + q * stride, b.head_dim * sizeof(T));
                    continue;
                }
                T* to = d_qkv + (b.prefix[r] * b.all_heads() + head) * b.head_dim;
                for (int64_t j = 0; j < b.head_dim; ++j) {
                    float sum = wide(to[j]);
                    for (int64_t q = 0; q < b.count; ++q) sum += wide(from[q * stride + j]);
                    to[j] = narrow(sum);
                }
            }
}

// Softmax of scores (count x heads x longest, padded_keys) times `scale`, in place. Row i belongs to the
// token at index i % longest of its sequence, which attends to itself and to the keys before it.
void causal_softmax(const Block& b, T* scores, float scale) {
    const int64_t rows = b.count * b.heads * b.longest;
#pragma omp parallel
    {
        struct alignas(64) Vector {
            float lanes[16];
        };
        // This is aligned, because a loop that started in the middle of a vector would sum in a different
        // order, and two runs would differ in their last bits.
        std::vector<Vector> aligned(b.padded_keys / 16 + 1);
#pragma omp for
        for (int64_t i = 0; i < rows; ++i) {
            T* row = scores + i * b.padded_keys;
            const int64_t visible = b.prefix_length + i % b.longest + 1;
            float max_score = -std::numeric_limits<float>::infinity(), sum = 0, *w = aligned.data()->lanes;
#pragma omp simd reduction(max : max_score)
            for (int64_t k = 0; k < visible; ++k) {
                w[k] = wide(row[k]) * scale;
                max_score = w[k] > max_score ? w[k] : max_score;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t k = 0; k < visible; ++k) sum += w[k] = fast_exp(w[k] - max_score);
            const float inverse = 1.0f / sum;
#pragma omp simd
            for (int64_t k = 0; k < visible; ++k) row[k] = narrow(w[k] * inverse);
            for (int64_t k = visible; k < b.padded_keys; ++k) row[k] = narrow(0.0f);
        }
    }
}

// The gradient of causal_softmax: d_probs is replaced by the gradient of the scores.
void causal_softmax_backward(const Block& b, const T* probs, T* d_probs, float scale) {
    const int64_t rows = b.count * b.heads * b.longest;
#pragma omp parallel for
    for (int64_t i = 0; i < rows; ++i) {
        const T* p = probs + i * b.padded_keys;
        T* d = d_probs + i * b.padded_keys;
        const int64_t visible = b.prefix_length + i % b.longest + 1;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t k = 0; k < visible; ++k) dot += wide(p[k]) * wide(d[k]);
#pragma omp simd
        for (int64_t k = 0; k < visible; ++k) d[k] = narrow(wide(p[k]) * (wide(d[k]) - dot) * scale);
        for (int64_t k = visible; k < b.padded_keys; ++k) d[k] = narrow(0.0f);
    }
}

}  // extern "C"
