// Turns logits (n, v) float32 into log-probs and tokens, for n tokens and v vocabulary entries.

#include "numbers.h"

extern "C" {

// Add a block of logits (n, v), for the vocabulary entries starting at `start`, to a running log-sum-exp. Its
// state is the maximum (n), the sum of exponentials (n) and the targets' logits (n), all at the given
// temperature.
void add_logits(const float* logits, float temperature, const int64_t* targets, int64_t start,
                float* max_logit, float* sum, float* target_logit, int64_t n, int64_t v) {
    const float inverse = 1.0f / temperature;
#pragma omp parallel for
    for (int64_t i = 0; i < n; ++i) {
        const float* row = logits + i * v;
        float highest = max_logit[i] / inverse, block_sum = 0;
#pragma omp simd reduction(max : highest)
        for (int64_t j = 0; j < v; ++j) highest = row[j] > highest ? row[j] : highest;
#pragma omp simd reduction(+ : block_sum)
        for (int64_t j = 0; j < v; ++j) block_sum += fast_exp((row[j] - highest) * inverse);
        highest *= inverse;
        sum[i] = sum[i] * std::exp(max_logit[i] - highest) + block_sum;
        max_logit[i] = highest;
        if (targets[i] >= start && targets[i] < start + v)
            target_logit[i] = row[targets[i] - start] * inverse;
    }
}

// Replace a block of logits (n, v) by the part of their gradient that comes from the softmax: -probability x
// d_log_prob (n) / temperature. The caller adds the part that comes from the target tokens.
void logits_backward(T* logits, float temperature, const float* log_sum_exp, const float* d_log_prob,
                     int64_t n, int64_t v) {
    const float inverse = 1.0f / temperature;
#pragma omp parallel for
    for (int64_t i = 0; i < n; ++i) {
        T* row = logits + i * v;
        const float total = log_sum_exp[i], factor = -d_log_prob[i] * inverse;
#pragma omp simd
        for (int64_t j = 0; j < v; ++j) row[j] = narrow(fast_exp(wide(row[j]) * inverse - total) * factor);
    }
}

// Choose one token per row of logits (n, v): the first whose cumulative probability at this temperature
// exceeds `uniform` (n). Also writes its log-prob. The probabilities are summed in chunks, and the chunks'
// sums tell which chunk holds the token.
void choose(const float* logits, float temperature, const float* uniform, int64_t* token, float* log_prob,
            int64_t n, int64_t v) {
    constexpr int64_t CHUNK = 512;
    const float inverse = 1.0f / temperature;
#pragma omp parallel
    {
        std::vector<float> sums((v + CHUNK - 1) / CHUNK);
#pragma omp for
        for (int64_t i = 0; i < n; ++i) {
            const float* row = logits + i * v;
            float max_logit = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : max_logit)
            for (int64_t j = 0; j < v; ++j) max_logit = row[j] > max_logit ? row[j] : max_logit;
            double total = 0;
            for (int64_t b = 0, start = 0; start < v; ++b, start += CHUNK) {
                const int64_t stop = std::min(start + CHUNK, v);
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = start; j < stop; ++j) sum += fast_exp((row[j] - max_logit) * inverse);
                total += sums[b] = sum;
            }
            double point = uniform[i] * total;
            int64_t b = 0, last = int64_t(sums.size()) - 1;
            while (b < last && point >= sums[b]) point -= sums[b++];
            const int64_t start = b * CHUNK, stop = std::min(start + CHUNK, v);
            int64_t chosen = -1;
            for (int64_t j = start; j < stop; ++j) {
                const float weight = fast_exp((row[j] - max_logit) * inverse);
                if (weight > 0) chosen = j;  // even if rounding leaves the point beyond the last token
                if ((point -= weight) < 0) break;
            }
            token[i] = chosen < 0 ? start : chosen;
            log_prob[i] = (row[token[i]] - max_logit) * inverse - float(std::log(total));
        }
    }
}

}  // extern "C"
