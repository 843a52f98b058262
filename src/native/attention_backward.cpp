// The gradient of attention: around its matrix products, which are PyTorch's, what lays their factors out and the softmax.

#include "block.h"

extern "C" {

void copy_or_clear(T* to, const T* from, int64_t e) {
    if (from)
        std::memcpy(to, from, e * sizeof(T));
    else
        std::memset(to, 0, e * sizeof(T));
}

// Rows of `heads` of x (tokens, of `all` heads, e) -> queries (count, kv_heads, share x longest, e); 0 where there is no token.
void gather_queries(const Block& b, const T* x, int64_t all, T* to) {
#pragma omp parallel for collapse(2)
    for (int64_t q = 0; q < b.count; ++q)
        for (int64_t h = 0; h < b.heads; ++h)
            for (int64_t r = 0; r < b.longest; ++r)
                copy_or_clear(to + ((q * b.heads + h) * b.longest + r) * b.e,
                              r < b.lengths[q] ? x + ((b.starts[q] + r) * all + h) * b.e : nullptr, b.e);
}

// The reverse: queries' rows -> x, of `all` heads.
void scatter_queries(const Block& b, const T* from, int64_t all, T* x) {
#pragma omp parallel for collapse(2)
    for (int64_t q = 0; q < b.count; ++q)
        for (int64_t h = 0; h < b.heads; ++h)
            for (int64_t r = 0; r < b.lengths[q]; ++r)
                std::memcpy(x + ((b.starts[q] + r) * all + h) * b.e, from + ((q * b.heads + h) * b.longest + r) * b.e,
                            b.e * sizeof(T));
}

// qkv (tokens, heads + 2 kv_heads, e) -> keys and values.
void gather_keys_values(const Block& b, const T* qkv, T* keys, T* values) {
#pragma omp parallel for collapse(2)
    for (int64_t q = 0; q < b.count; ++q)
        for (int64_t h = 0; h < b.kv_heads; ++h)
            for (int64_t r = 0; r < b.keys; ++r) {
                const int64_t token = b.token(q, r), to = ((q * b.kv_heads + h) * b.keys + r) * b.e;
                const T* key = qkv + (token * b.all() + b.heads + h) * b.e;
                copy_or_clear(keys + to, token < 0 ? nullptr : key, b.e);
                copy_or_clear(values + to, token < 0 ? nullptr : key + b.kv_heads * b.e, b.e);
            }
}

// Gradients of keys and values -> of_qkv: a sequence's own rows are set, those of the prefix, summed over the sequences, added.
void scatter_keys_values(const Block& b, const T* of_keys, const T* of_values, T* of_qkv) {
#pragma omp parallel for collapse(2)
    for (int64_t h = 0; h < b.kv_heads; ++h)
        for (int64_t r = 0; r < b.before + b.longest; ++r)
            for (int which = 0; which < 2; ++which) {
                const T* from = (which ? of_values : of_keys) + (h * b.keys + r) * b.e;
                const int64_t next = b.kv_heads * b.keys * b.e, head = b.heads + (which ? b.kv_heads : 0) + h;
                if (r >= b.before) {
                    for (int64_t q = 0; q < b.count; ++q)
                        if (b.token(q, r) >= 0) std::memcpy(of_qkv + (b.token(q, r) * b.all() + head) * b.e, from + q * next, b.e * sizeof(T));
                    continue;
                }
                T* to = of_qkv + (b.prefix[r] * b.all() + head) * b.e;
                for (int64_t j = 0; j < b.e; ++j) {
                    float sum = wide(to[j]);
                    for (int64_t q = 0; q < b.count; ++q) sum += wide(from[q * next + j]);
                    to[j] = narrow(sum);
                }
            }
}

// Scores (rows of all sequences and heads of keys, keys) times `by` -> probabilities in place; row r is about token r % longest of
// its sequence, which sees the keys before it and itself.
void causal_softmax(const Block& b, T* scores, float by) {
    const int64_t rows = b.count * b.heads * b.longest;
#pragma omp parallel
    {
        struct alignas(64) Vector {
            float lanes[16];
        };
        // Aligned: a loop that begins elsewhere in a vector sums in another order, and two runs would differ in their last bits.
        std::vector<Vector> aligned(b.keys / 16 + 1);
#pragma omp for
        for (int64_t i = 0; i < rows; ++i) {
            T* row = scores + i * b.keys;
            const int64_t seen = b.before + i % b.longest + 1;
            float most = -std::numeric_limits<float>::infinity(), sum = 0, *w = aligned.data()->lanes;
#pragma omp simd reduction(max : most)
            for (int64_t k = 0; k < seen; ++k) {
                w[k] = wide(row[k]) * by;
                most = w[k] > most ? w[k] : most;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t k = 0; k < seen; ++k) sum += w[k] = fast_exp(w[k] - most);
            const float share_of = 1.0f / sum;
#pragma omp simd
            for (int64_t k = 0; k < seen; ++k) row[k] = narrow(w[k] * share_of);
            for (int64_t k = seen; k < b.keys; ++k) row[k] = narrow(0.0f);
        }
    }
}

// The gradient of causal_softmax: of_probs -> of_scores in place.
void causal_softmax_backward(const Block& b, const T* probs, T* of_probs, float by) {
    const int64_t rows = b.count * b.heads * b.longest;
#pragma omp parallel for
    for (int64_t i = 0; i < rows; ++i) {
        const T* p = probs + i * b.keys;
        T* of = of_probs + i * b.keys;
        const int64_t seen = b.before + i % b.longest + 1;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t k = 0; k < seen; ++k) dot += wide(p[k]) * wide(of[k]);
#pragma omp simd
        for (int64_t k = 0; k < seen; ++k) of[k] = narrow(wide(p[k]) * (wide(of[k]) - dot) * by);
        for (int64_t k = seen; k < b.keys; ++k) of[k] = narrow(0.0f);
    }
}

}  // extern "C"
