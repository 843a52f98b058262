// Logits (n, v) float32 into log-probs and tokens, n tokens, v entries of the vocabulary.

#include "numbers.h"

extern "C" {

// A block (n, v) of a vocabulary's logits, tokens from `start` on, taken into the running maximum (n), sum of exponentials (n)
// and logit of the target (n); all at this temperature.
void take_logits(const float* logits, float temperature, const int64_t* targets, int64_t start, float* most, float* sum,
                 float* of_target, int64_t n, int64_t v) {
    const float by = 1.0f / temperature;
#pragma omp parallel for
    for (int64_t i = 0; i < n; ++i) {
        const float* row = logits + i * v;
        float highest = most[i] / by, here = 0;
#pragma omp simd reduction(max : highest)
        for (int64_t j = 0; j < v; ++j) highest = row[j] > highest ? row[j] : highest;
#pragma omp simd reduction(+ : here)
        for (int64_t j = 0; j < v; ++j) here += fast_exp((row[j] - highest) * by);
        highest *= by;
        sum[i] = sum[i] * std::exp(most[i] - highest) + here;
        most[i] = highest;
        if (targets[i] >= start && targets[i] < start + v) of_target[i] = row[targets[i] - start] * by;
    }
}

// The gradient of log-probs in a block of logits (n, v), the targets' own part apart, in place: -probability x grad (n) / temperature.
void logits_backward(T* logits, float temperature, const float* log_total, const float* grad, int64_t n, int64_t v) {
    const float by = 1.0f / temperature;
#pragma omp parallel for
    for (int64_t i = 0; i < n; ++i) {
        T* row = logits + i * v;
        const float total = log_total[i], factor = -grad[i] * by;
#pragma omp simd
        for (int64_t j = 0; j < v; ++j) row[j] = narrow(fast_exp(wide(row[j]) * by - total) * factor);
    }
}

// One token for each row of logits (n, v): the first whose cumulated probability at this temperature exceeds `uniform` (n), and
// the log of its probability. Vocabulary in pieces: their sums say in which the token is.
void choose(const float* logits, float temperature, const float* uniform, int64_t* token, float* log_prob, int64_t n, int64_t v) {
    constexpr int64_t PIECE = 512;
    const float by = 1.0f / temperature;
#pragma omp parallel
    {
        std::vector<float> sums((v + PIECE - 1) / PIECE), weights(PIECE);
#pragma omp for
        for (int64_t i = 0; i < n; ++i) {
            const float* row = logits + i * v;
            float most = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : most)
            for (int64_t j = 0; j < v; ++j) most = row[j] > most ? row[j] : most;
            double total = 0;
            for (int64_t b = 0, start = 0; start < v; ++b, start += PIECE) {
                const int64_t stop = std::min(start + PIECE, v);
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = start; j < stop; ++j) sum += fast_exp((row[j] - most) * by);
                total += sums[b] = sum;
            }
            double point = uniform[i] * total;
            int64_t b = 0, last = int64_t(sums.size()) - 1;
            while (b < last && point >= sums[b]) point -= sums[b++];
            const int64_t start = b * PIECE, stop = std::min(start + PIECE, v);
            int64_t chosen = -1;
            for (int64_t j = start; j < stop; ++j) {
                const float weight = fast_exp((row[j] - most) * by);
                if (weight > 0) chosen = j;  // where rounding leaves the point beyond the last
                if ((point -= weight) < 0) break;
            }
            token[i] = chosen < 0 ? start : chosen;
            log_prob[i] = (row[token[i]] - most) * by - float(std::log(total));
        }
    }
}

}  // extern "C"
