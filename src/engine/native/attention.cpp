// Attention, computed one query token at a time: for the newest token of each row in a decode batch, or for
// all tokens of given sequences.

#include <type_traits>

#include "block.h"
#include "vectors.h"

// Keys are stored in blocks of LANES columns, as (head_dim, LANES), so one vector of float32 holds the same
// entry of LANES keys.

// Keys and values of one layer, with a slot for each sequence. Its Python counterpart is kernels.NativeCache.
struct Cache {
    T *keys, *values;  // (slots, kv_heads, columns, head_dim), keys in blocks of LANES columns
    int64_t columns;
    const int64_t* slots;  // (n), the slot of each row
    T* keys_for(int64_t row, int64_t head, int64_t kv_heads, int64_t head_dim) const {
        return keys + (slots[row] * kv_heads + head) * columns * head_dim;
    }
    T* values_for(int64_t row, int64_t head, int64_t kv_heads, int64_t head_dim) const {
        return values + (slots[row] * kv_heads + head) * columns * head_dim;
    }
};

namespace {

// Prefetch memory that will be read soon. The keys and values of a batch do not fit in the processor's cache,
// and they lie in pieces that are too short for the hardware prefetcher.
inline void prefetch(const void* from, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(from) + b, 0, 2);
}

// Queries (Q, E) float32 times keys (columns / LANES, E, LANES) -> scores (Q, columns), with rows `width`
// apart.
template <int Q, int E>
void score_keys(const float* queries, const T* keys, int64_t columns, float* scores, int64_t width) {
    for (int64_t c = 0; c < columns; c += LANES) {
        Vector even[Q] = {}, odd[Q] = {};  // two independent sums; a single one would wait for each addition
        for (int j = 0; j < E; j += 2) {
            const Vector k = load(keys + c * E + j * LANES), next = load(keys + c * E + (j + 1) * LANES);
            for (int q = 0; q < Q; ++q) {
                add_product(even[q], queries[q * E + j], k);
                add_product(odd[q], queries[q * E + j + 1], next);
            }
        }
        // In the last block, this may write beyond `columns`, but nothing is read there.
        for (int q = 0; q < Q; ++q) store(scores + q * width + c, even[q] + odd[q]);
    }
}

// Add values (columns, E), each multiplied by its probability, to sums (Q, E). It adds as many entries at a
// time as its registers can hold the sums of.
template <int Q, int E>
void add_values(const float* probs, int64_t width, const T* values, int64_t columns, float* sums) {
    constexpr int VECTORS = E / LANES, FIT = REGISTERS * 3 / 4 / (Q * PARTS);
    constexpr int AT_ONCE = FIT >= VECTORS ? VECTORS : FIT >= 2 && VECTORS % 2 == 0 ? 2 : 1;
    for (int first = 0; first < VECTORS; first += AT_ONCE) {
        Vector total[Q][AT_ONCE];
        for (int q = 0; q < Q; ++q)
            for (int j = 0; j < AT_ONCE; ++j) total[q][j] = load(sums + q * E + (first + j) * LANES);
        for (int64_t c = 0; c < columns; ++c)
            for (int j = 0; j < AT_ONCE; ++j) {
                const Vector v = load(values + c * E + (first + j) * LANES);
                for (int q = 0; q < Q; ++q) add_product(total[q][j], probs[q * width + c], v);
            }
        for (int q = 0; q < Q; ++q)
            for (int j = 0; j < AT_ONCE; ++j) store(sums + q * E + (first + j) * LANES, total[q][j]);
    }
}

// Write a key (E) to column c of keys that are stored in blocks.
template <int E>
void put_key(const T* key, int64_t c, T* keys) {
    T* to = keys + c / LANES * LANES * E + c % LANES;
    for (int j = 0; j < E; ++j) to[j * LANES] = key[j];
}

// Replace the first `total` scores by exp(score - maximum), and return their sum, which the caller divides
// by. The sum is accumulated lane by lane, so it does not depend on the address of the scores.
inline float exponentials(float* scores, int64_t total) {
    for (int64_t k = total; k % LANES; ++k) scores[k] = -std::numeric_limits<float>::infinity();
    float max_score = scores[0], sum = 0, lanes[LANES] = {0};
#pragma omp simd reduction(max : max_score)
    for (int64_t k = 1; k < total; ++k) max_score = scores[k] > max_score ? scores[k] : max_score;
    for (int64_t k = 0; k < total; k += LANES)
#pragma omp simd
        for (int64_t l = 0; l < LANES; ++l) lanes[l] += scores[k + l] = fast_exp(scores[k + l] - max_score);
    for (float lane : lanes) sum += lane;
    return sum;
}

// Attention of one token: Q query heads (Q, E) that share a key head -> to (Q, E). The token attends to
// `length` columns of a prompt, then to `count` columns of its own sequence. Sampling and training both run
// this code, so their results are bit-identical.
template <int E, int Q>
void attend(const T* queries, const T* prompt_keys, const T* prompt_values, int64_t length, const T* keys,
            const T* values, int64_t count, float* scores, int64_t width, T* to) {
    const float scale = 1.0f / std::sqrt(float(E));
    float scaled[Q * E], attended[Q * E] = {0}, sums[Q];
#pragma omp simd
    for (int j = 0; j < Q * E; ++j) scaled[j] = wide(queries[j]) * scale;
    score_keys<Q, E>(scaled, prompt_keys, length, scores, width);
    score_keys<Q, E>(scaled, keys, count, scores + length, width);
    for (int q = 0; q < Q; ++q) sums[q] = exponentials(scores + q * width, length + count);
    add_values<Q, E>(scores, width, prompt_values, length, attended);
    add_values<Q, E>(scores + length, width, values, count, attended);
    for (int q = 0; q < Q; ++q)
#pragma omp simd
        for (int j = 0; j < E; ++j) to[q * E + j] = narrow(attended[q * E + j] / sums[q]);
}

// Process one token for each of n rows in one layer: rotate its queries and its key to its position, append
// its key and value to the row's own cache at column `filled`, and attend to the row's prompt and the row's
// own cache.
//
// Shapes: qkv (n, heads + 2 kv_heads, E), cos and sin (positions, E), positions (n), prompt_lengths
// (prompts), out (n, heads, E). Q is the number of queries processed at once.
template <int E, int Q>
void decode(const T* qkv, const float* cos, const float* sin, const int64_t* positions, Cache own,
            int64_t filled, Cache prompts, const int64_t* prompt_lengths, T* out, int64_t n, int64_t heads,
            int64_t kv_heads) {
    const int64_t share = heads / kv_heads, all_heads = heads + 2 * kv_heads;
    const int64_t width = prompts.columns + own.columns + LANES;
#pragma omp parallel
    {
        std::vector<float> scores(Q * width);
#pragma omp for collapse(2)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t h = 0; h < kv_heads; ++h) {
                const T* row = qkv + i * all_heads * E;
                const float *c = cos + positions[i] * E, *s = sin + positions[i] * E;
                T rotated[Q * E];
                T *keys = own.keys_for(i, h, kv_heads, E), *values = own.values_for(i, h, kv_heads, E);
                rotate_head(row + (heads + h) * E, c, s, E, rotated);
                put_key<E>(rotated, filled, keys);
                std::memcpy(values + filled * E, row + (heads + kv_heads + h) * E, E * sizeof(T));
                if (const int64_t next = i + (h + 1) / kv_heads; next < n) {
                    // Prefetch what the next iteration will read.
                    const int64_t next_head = (h + 1) % kv_heads;
                    const int64_t key_bytes = (filled / LANES + 1) * LANES * E * sizeof(T);
                    prefetch(own.keys_for(next, next_head, kv_heads, E), key_bytes);
                    prefetch(own.values_for(next, next_head, kv_heads, E), filled * E * sizeof(T));
                }
                for (int64_t first = h * share; first < (h + 1) * share; first += Q) {
                    for (int q = 0; q < Q; ++q) rotate_head(row + (first + q) * E, c, s, E, rotated + q * E);
                    attend<E, Q>(rotated, prompts.keys_for(i, h, kv_heads, E),
                                 prompts.values_for(i, h, kv_heads, E), prompt_lengths[prompts.slots[i]],
                                 keys, values, filled + 1, scores.data(), width,
                                 out + (i * heads + first) * E);
                }
            }
    }
}

// Attention of every token in a block: qkv (tokens, heads + 2 kv_heads, E), with queries and keys already
// rotated -> out (tokens, heads, E).
template <int E, int Q>
void attend_all(const Block& b, const T* qkv, T* out) {
    const int64_t width = b.prefix_length + b.longest + 3 * LANES;
    // The column where a sequence's own keys start: after the prefix, at the next multiple of LANES.
    const int64_t own_start = (b.prefix_length + LANES - 1) / LANES * LANES;
#pragma omp parallel
    {
        std::vector<float> scores(Q * width);
        std::vector<T> keys((own_start + b.longest + LANES) * E), values((own_start + b.longest) * E);
        int64_t prefix_head = -1;  // the head whose prefix is already in `keys` and `values`
#pragma omp for collapse(2) schedule(static)
        for (int64_t h = 0; h < b.kv_heads; ++h)
            for (int64_t q = 0; q < b.count; ++q) {
                for (int64_t r = prefix_head == h ? b.prefix_length : 0; r < b.prefix_length + b.lengths[q];
                     ++r) {
                    const T* key = qkv + (b.token(q, r) * b.all_heads() + b.heads + h) * E;
                    const int64_t to = r < b.prefix_length ? r : own_start + r - b.prefix_length;
                    put_key<E>(key, to, keys.data());
                    std::memcpy(values.data() + to * E, key + b.kv_heads * E, E * sizeof(T));
                }
                prefix_head = h;
                for (int64_t r = 0; r < b.lengths[q]; ++r)
                    for (int64_t first = h * b.share(); first < (h + 1) * b.share(); first += Q) {
                        const T* queries = qkv + ((b.starts[q] + r) * b.all_heads() + first) * E;
                        attend<E, Q>(queries, keys.data(), values.data(), b.prefix_length,
                                     keys.data() + own_start * E, values.data() + own_start * E, r + 1,
                                     scores.data(), width, out + ((b.starts[q] + r) * b.heads + first) * E);
                    }
            }
    }
}

// Call run(E, Q) with compile-time constants: E is the head dimension, and Q is how many of the queries that
// share a key head are processed at once.
template <int E, class Run>
int with_queries(int64_t share, Run run) {
    if (share % 4 == 0) return run(std::integral_constant<int, E>(), std::integral_constant<int, 4>());
    if (share % 3 == 0) return run(std::integral_constant<int, E>(), std::integral_constant<int, 3>());
    if (share % 2 == 0) return run(std::integral_constant<int, E>(), std::integral_constant<int, 2>());
    return run(std::integral_constant<int, E>(), std::integral_constant<int, 1>());
}

template <class Run>
int with_sizes(int64_t head_dim, int64_t share, Run run) {
    switch (head_dim) {
        case 16: return with_queries<16>(share, run);
        case 32: return with_queries<32>(share, run);
        case 64: return with_queries<64>(share, run);
        case 96: return with_queries<96>(share, run);
        case 128: return with_queries<128>(share, run);
    }
    return 1;
}

}  // namespace

extern "C" {

// See `decode`. Like block_attention, it returns 1 if the code is not compiled for this head_dim, and 0
// otherwise.
int decode_attention(const T* qkv, const float* cos, const float* sin, const int64_t* positions,
                     const Cache& own, int64_t filled, const Cache& prompts, const int64_t* prompt_lengths,
                     T* out, int64_t n, int64_t heads, int64_t kv_heads, int64_t head_dim) {
    return with_sizes(head_dim, heads / kv_heads, [&](auto E, auto Q) {
        decode<E, Q>(qkv, cos, sin, positions, own, filled, prompts, prompt_lengths, out, n, heads, kv_heads);
        return 0;
    });
}

int block_attention(const Block& b, const T* qkv, T* out) {
    return with_sizes(b.head_dim, b.share(), [&](auto E, auto Q) {
        attend_all<E, Q>(b, qkv, out);
        return 0;
    });
}

}  // extern "C"
