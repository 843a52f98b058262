// Attention of one new token for each row of a batch, to the row's prompt, which its group shares, and to what it has sampled.

#include "numbers.h"

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

// Rotary embedding of a head (E): x cos + (halves exchanged) sin, the sine with the sign of rotate_half; rounded to T.
template <int E>
void rotated(const T* x, const float* cos, const float* sin, T* to) {
    constexpr int half = E / 2;
#pragma omp simd
    for (int j = 0; j < half; ++j) {
        const float front = wide(x[j]), back = wide(x[j + half]);
        to[j] = narrow(front * cos[j] + back * sin[j]);
        to[j + half] = narrow(back * cos[j + half] + front * sin[j + half]);
    }
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
void attention(const T* qkv, const float* cos, const float* sin, const int64_t* positions, Cache own, int64_t filled,
                         Cache prompts, const int64_t* prompt_lengths, T* out, int64_t n, int64_t heads, int64_t kv_heads) {
    const int64_t share = heads / kv_heads, all = heads + 2 * kv_heads;
    const int64_t width = prompts.columns + own.columns + LANES;
    const float by = 1.0f / std::sqrt(float(E));
#pragma omp parallel
    {
        std::vector<float> scores(Q * width);
#pragma omp for collapse(2)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t h = 0; h < kv_heads; ++h) {
                const T* row = qkv + i * all * E;
                const float *c = cos + positions[i] * E, *s = sin + positions[i] * E;
                T turned[E], *block = own.keys_of(i, h, kv_heads, E) + filled / LANES * LANES * E + filled % LANES;
                rotated<E>(row + (heads + h) * E, c, s, turned);
                for (int j = 0; j < E; ++j) block[j * LANES] = turned[j];
                std::memcpy(own.values_of(i, h, kv_heads, E) + filled * E, row + (heads + kv_heads + h) * E, E * sizeof(T));
                const int64_t length = prompt_lengths[prompts.slots[i]], total = length + filled + 1;
                if (const int64_t next = i + (h + 1) / kv_heads; next < n) {  // the row and head after this
                    fetch(own.keys_of(next, (h + 1) % kv_heads, kv_heads, E), (filled / LANES + 1) * LANES * E * sizeof(T));
                    fetch(own.values_of(next, (h + 1) % kv_heads, kv_heads, E), filled * E * sizeof(T));
                }
                for (int64_t first = 0; first < share; first += Q) {
                    float queries[Q * E], attended[Q * E] = {0};
                    for (int q = 0; q < Q; ++q) {
                        rotated<E>(row + (h * share + first + q) * E, c, s, turned);
#pragma omp simd
                        for (int j = 0; j < E; ++j) queries[q * E + j] = wide(turned[j]) * by;
                    }
                    score_keys<Q, E>(queries, prompts.keys_of(i, h, kv_heads, E), length, &scores[0], width);
                    score_keys<Q, E>(queries, own.keys_of(i, h, kv_heads, E), filled + 1, &scores[length], width);
                    float sums[Q];
                    for (int q = 0; q < Q; ++q) {
                        float *p = &scores[q * width], most = -std::numeric_limits<float>::infinity(), sum = 0;
#pragma omp simd reduction(max : most)
                        for (int64_t k = 0; k < total; ++k) most = p[k] > most ? p[k] : most;
#pragma omp simd reduction(+ : sum)
                        for (int64_t k = 0; k < total; ++k) sum += p[k] = fast_exp(p[k] - most);
                        sums[q] = sum;
                    }
                    add_values<Q, E>(&scores[0], width, prompts.values_of(i, h, kv_heads, E), length, attended);
                    add_values<Q, E>(&scores[length], width, own.values_of(i, h, kv_heads, E), filled + 1, attended);
                    T* to = out + (i * heads + h * share + first) * E;
                    for (int q = 0; q < Q; ++q)
#pragma omp simd
                        for (int j = 0; j < E; ++j) to[q * E + j] = narrow(attended[q * E + j] / sums[q]);
                }
            }
    }
}

template <int E, class... Arguments>
void with_queries(int64_t share, Arguments... arguments) {
    if (share % 4 == 0) return attention<E, 4>(arguments...);
    if (share % 3 == 0) return attention<E, 3>(arguments...);
    if (share % 2 == 0) return attention<E, 2>(arguments...);
    return attention<E, 1>(arguments...);
}

}  // namespace

// See `attention`. Returns 1 where no kernel was compiled for heads of e entries.
extern "C" int decode_attention(int64_t e, const T* qkv, const float* cos, const float* sin, const int64_t* positions, T* keys,
                                T* values, int64_t columns, const int64_t* slots, int64_t filled, T* prompt_keys, T* prompt_values,
                                int64_t prompt_columns, const int64_t* prompts, const int64_t* prompt_lengths, T* out, int64_t n,
                                int64_t heads, int64_t kv_heads) {
    const Cache own{keys, values, columns, slots}, of_prompts{prompt_keys, prompt_values, prompt_columns, prompts};
    auto run = [&](auto attend) {
        attend(heads / kv_heads, qkv, cos, sin, positions, own, filled, of_prompts, prompt_lengths, out, n, heads, kv_heads);
        return 0;
    };
#define FOR_HEADS_OF(E) \
    if (e == E) return run([](int64_t share, auto... arguments) { with_queries<E>(share, arguments...); })
    FOR_HEADS_OF(16);
    FOR_HEADS_OF(32);
    FOR_HEADS_OF(64);
    FOR_HEADS_OF(96);
    FOR_HEADS_OF(128);
    return 1;
}
