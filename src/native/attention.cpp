// Attention, token by token: of one new token for each row of a decode batch, and of all tokens of given sequences.

#include <type_traits>

#include "block.h"

namespace {

constexpr int64_t LANES = 16;  // columns of a block of keys: a vector of float32 holds one entry of each

// LANES numbers at once, whatever vectors the machine has.
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t uints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

inline floats load(const float* from) {
    floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline floats load(const bfloat16* from) {
    halves bits;
    std::memcpy(&bits, from, sizeof bits);
    return (floats)(__builtin_convertvector(bits, uints) << 16);
}
inline void store(float* to, floats x) { std::memcpy(to, &x, sizeof x); }

// Ask for `bytes` that will be read soon: the caches of a batch are more than the processor's, in pieces too short to foresee.
inline void fetch(const void* from, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(from) + b, 0, 2);
}

// Queries (Q, E) float32 against keys in blocks of LANES columns (columns / LANES, E, LANES) -> scores, `width` apart.
template <int Q, int E>
void score_keys(const float* queries, const T* keys, int64_t columns, float* scores, int64_t width) {
    for (int64_t c = 0; c < columns; c += LANES) {
        floats even[Q] = {}, odd[Q] = {};  // two chains of sums each: one would wait for itself
        for (int j = 0; j < E; j += 2) {
            const floats k = load(keys + c * E + j * LANES), next = load(keys + c * E + (j + 1) * LANES);
            for (int q = 0; q < Q; ++q) {
                even[q] += queries[q * E + j] * k;
                odd[q] += queries[q * E + j + 1] * next;
            }
        }
        for (int q = 0; q < Q; ++q) store(scores + q * width + c, even[q] + odd[q]);  // past `columns` nobody reads
    }
}

// Values (columns, E), each times its probability, added to sums (Q, E).
template <int Q, int E>
void add_values(const float* probs, int64_t width, const T* values, int64_t columns, float* sums) {
    floats of[Q][E / LANES];
    std::memcpy(of, sums, sizeof of);
    for (int64_t c = 0; c < columns; ++c)
        for (int j = 0; j < E / LANES; ++j) {
            const floats v = load(values + c * E + j * LANES);
            for (int q = 0; q < Q; ++q) of[q][j] += probs[q * width + c] * v;
        }
    std::memcpy(sums, of, sizeof of);
}

// A key (E) into column c of keys in blocks.
template <int E>
void put_key(const T* key, int64_t c, T* keys) {
    T* to = keys + c / LANES * LANES * E + c % LANES;
    for (int j = 0; j < E; ++j) to[j * LANES] = key[j];
}

// Softmax over the first `total` scores, not yet divided by their sum, which is returned. Lane by lane: the same sum wherever the
// scores lie.
inline float exponentials(float* scores, int64_t total) {
    for (int64_t k = total; k % LANES; ++k) scores[k] = -std::numeric_limits<float>::infinity();
    float most = scores[0], sum = 0, lanes[LANES] = {0};
#pragma omp simd reduction(max : most)
    for (int64_t k = 1; k < total; ++k) most = scores[k] > most ? scores[k] : most;
    for (int64_t k = 0; k < total; k += LANES)
#pragma omp simd
        for (int64_t l = 0; l < LANES; ++l) lanes[l] += scores[k + l] = fast_exp(scores[k + l] - most);
    for (float lane : lanes) sum += lane;
    return sum;
}

// Q heads of queries (Q, E) of one token, all of one head of keys -> to (Q, E). It sees the `length` columns of a prompt, then
// `count` of its own. The one piece of code that attends, in sampling and in training: their results have the same bits.
template <int E, int Q>
void attend(const T* queries, const T* prompt_keys, const T* prompt_values, int64_t length, const T* keys, const T* values,
            int64_t count, float* scores, int64_t width, T* to) {
    const float by = 1.0f / std::sqrt(float(E));
    float scaled[Q * E], attended[Q * E] = {0}, sums[Q];
#pragma omp simd
    for (int j = 0; j < Q * E; ++j) scaled[j] = wide(queries[j]) * by;
    score_keys<Q, E>(scaled, prompt_keys, length, scores, width);
    score_keys<Q, E>(scaled, keys, count, scores + length, width);
    for (int q = 0; q < Q; ++q) sums[q] = exponentials(scores + q * width, length + count);
    add_values<Q, E>(scores, width, prompt_values, length, attended);
    add_values<Q, E>(scores + length, width, values, count, attended);
    for (int q = 0; q < Q; ++q)
#pragma omp simd
        for (int j = 0; j < E; ++j) to[q * E + j] = narrow(attended[q * E + j] / sums[q]);
}

// Where a row's keys and values are: those of all prompts, and its own.
struct Cache {
    T *keys, *values;  // (slots, kv_heads, columns, E), keys in blocks of LANES columns
    int64_t columns;
    const int64_t* slots;  // (n), of each row
    T* keys_of(int64_t i, int64_t h, int64_t kv_heads, int64_t e) const { return keys + (slots[i] * kv_heads + h) * columns * e; }
    T* values_of(int64_t i, int64_t h, int64_t kv_heads, int64_t e) const { return values + (slots[i] * kv_heads + h) * columns * e; }
};

// One token for each of n rows in one layer: rotate its queries and its key to its position, put key and value into the row's
// own cache at column `filled`, and attend to its prompt's cache and to its own.
//
// qkv (n, heads + 2 kv_heads, E); cos, sin (positions, E); prompt_lengths (prompts) -> out (n, heads, E). Q: queries at once.
template <int E, int Q>
void decode(const T* qkv, const float* cos, const float* sin, const int64_t* positions, Cache own, int64_t filled, Cache prompts,
            const int64_t* prompt_lengths, T* out, int64_t n, int64_t heads, int64_t kv_heads) {
    const int64_t share = heads / kv_heads, all = heads + 2 * kv_heads, width = prompts.columns + own.columns + LANES;
#pragma omp parallel
    {
        std::vector<float> scores(Q * width);
#pragma omp for collapse(2)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t h = 0; h < kv_heads; ++h) {
                const T* row = qkv + i * all * E;
                const float *c = cos + positions[i] * E, *s = sin + positions[i] * E;
                T turned[Q * E], *keys = own.keys_of(i, h, kv_heads, E), *values = own.values_of(i, h, kv_heads, E);
                rotate_head(row + (heads + h) * E, c, s, E, turned);
                put_key<E>(turned, filled, keys);
                std::memcpy(values + filled * E, row + (heads + kv_heads + h) * E, E * sizeof(T));
                if (const int64_t next = i + (h + 1) / kv_heads; next < n) {  // the row and head after this
                    fetch(own.keys_of(next, (h + 1) % kv_heads, kv_heads, E), (filled / LANES + 1) * LANES * E * sizeof(T));
                    fetch(own.values_of(next, (h + 1) % kv_heads, kv_heads, E), filled * E * sizeof(T));
                }
                for (int64_t first = h * share; first < (h + 1) * share; first += Q) {
                    for (int q = 0; q < Q; ++q) rotate_head(row + (first + q) * E, c, s, E, turned + q * E);
                    attend<E, Q>(turned, prompts.keys_of(i, h, kv_heads, E), prompts.values_of(i, h, kv_heads, E),
                                 prompt_lengths[prompts.slots[i]], keys, values, filled + 1, scores.data(), width,
                                 out + (i * heads + first) * E);
                }
            }
    }
}

// Every token of the sequences of a block, from rotated queries and keys: qkv (tokens, heads + 2 kv_heads, E) -> out (tokens, heads, E).
template <int E, int Q>
void attend_all(const Block& b, const T* qkv, T* out) {
    const int64_t width = b.before + b.longest + 3 * LANES, behind = (b.before + LANES - 1) / LANES * LANES;
#pragma omp parallel
    {
        std::vector<float> scores(Q * width);
        std::vector<T> keys((behind + b.longest + LANES) * E), values((behind + b.longest) * E);
        int64_t prefix_of = -1;  // the head whose keys and values of the prefix are there
#pragma omp for collapse(2) schedule(static)
        for (int64_t h = 0; h < b.kv_heads; ++h)
            for (int64_t q = 0; q < b.count; ++q) {
                for (int64_t r = prefix_of == h ? b.before : 0; r < b.before + b.lengths[q]; ++r) {
                    const T* key = qkv + (b.token(q, r) * b.all() + b.heads + h) * E;
                    const int64_t to = r < b.before ? r : behind + r - b.before;
                    put_key<E>(key, to, keys.data());
                    std::memcpy(values.data() + to * E, key + b.kv_heads * E, E * sizeof(T));
                }
                prefix_of = h;
                for (int64_t r = 0; r < b.lengths[q]; ++r)
                    for (int64_t first = h * b.share(); first < (h + 1) * b.share(); first += Q)
                        attend<E, Q>(qkv + ((b.starts[q] + r) * b.all() + first) * E, keys.data(), values.data(), b.before,
                                     keys.data() + behind * E, values.data() + behind * E, r + 1, scores.data(), width,
                                     out + ((b.starts[q] + r) * b.heads + first) * E);
            }
    }
}

// Calls run(E, Q) with numbers known to the compiler, Q the queries of a head of keys that are attended to at once.
template <int E, class Run>
int with_queries(int64_t share, Run run) {
    if (share % 4 == 0) return run(std::integral_constant<int, E>(), std::integral_constant<int, 4>());
    if (share % 3 == 0) return run(std::integral_constant<int, E>(), std::integral_constant<int, 3>());
    if (share % 2 == 0) return run(std::integral_constant<int, E>(), std::integral_constant<int, 2>());
    return run(std::integral_constant<int, E>(), std::integral_constant<int, 1>());
}

template <class Run>
int with_sizes(int64_t e, int64_t share, Run run) {
    switch (e) {
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

// See `decode`. Returns 1 where nothing was compiled for heads of e entries, as the next does.
int decode_attention(int64_t e, const T* qkv, const float* cos, const float* sin, const int64_t* positions, T* keys, T* values,
                     int64_t columns, const int64_t* slots, int64_t filled, T* prompt_keys, T* prompt_values, int64_t prompt_columns,
                     const int64_t* prompts, const int64_t* prompt_lengths, T* out, int64_t n, int64_t heads, int64_t kv_heads) {
    const Cache own{keys, values, columns, slots}, of_prompts{prompt_keys, prompt_values, prompt_columns, prompts};
    return with_sizes(e, heads / kv_heads, [&](auto E, auto Q) {
        decode<E, Q>(qkv, cos, sin, positions, own, filled, of_prompts, prompt_lengths, out, n, heads, kv_heads);
        return 0;
    });
}

int block_attention(const Block& b, const T* qkv, T* out) {
    return with_sizes(b.e, b.share(), [&](auto E, auto Q) {
        attend_all<E, Q>(b, qkv, out);
        return 0;
    });
}

}  // extern "C"
