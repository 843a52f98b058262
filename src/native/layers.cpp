// What a Llama-like model does between its matrix products, attention apart, each in one pass over memory; with gradients.
// n tokens, d hidden or inner size.

#include "numbers.h"

extern "C" {

// x (n, d) float32 plus delta, if any, -> sum (n, d), untouched where there is none; its RMSNorm -> y (n, d), 1 / root mean square -> scale (n).
void add_norm(const float* x, const T* delta, const T* weight, float eps, float* sum, T* y, float* scale, int64_t n, int64_t d) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; ++i) {
        const float* total = x + i * d;
        if (delta) {
            const T* add = delta + i * d;
            float* to = sum + i * d;
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) to[j] = total[j] + wide(add[j]);
            total = to;
        }
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < d; ++j) squares += total[j] * total[j];
        float factor = 1.0f / std::sqrt(squares / d + eps);
        scale[i] = factor;
        T* out = y + i * d;
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) out[j] = narrow(total[j] * factor * wide(weight[j]));
    }
}

// Gate and up (n, 2 d) side by side -> silu(gate) * up (n, d).
void swiglu(const T* gate_up, T* out, int64_t n, int64_t d) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; ++i) {
        const T *gate = gate_up + i * 2 * d, *up = gate + d;
        T* to = out + i * d;
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) {
            float g = wide(gate[j]);
            to[j] = narrow(g * sigmoid(g) * wide(up[j]));
        }
    }
}

// The gradient of add_norm: grad (n, d) of y; x (n, d) plus delta, if any, its sum; scale from it.
// Adds to of_x (n, d) float32 and rounds what is there then into of_x_rounded (n, d); gives y once more, and of_weight (d).
void norm_backward(const T* grad, const float* x, const T* delta, const float* scale, const T* weight, float* of_x, T* of_x_rounded,
                   T* y, float* of_weight, int64_t n, int64_t d) {
    const int threads = omp_get_max_threads();
    std::vector<float> sums(threads * d);  // of each thread, added up in order: the same bits in every run
#pragma omp parallel num_threads(threads)
    {
        float* of_mine = &sums[omp_get_thread_num() * d];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) {
            const T *g = grad + i * d, *add = delta ? delta + i * d : nullptr;
            const float *from = x + i * d, factor = scale[i];
            float *to = of_x + i * d, dot = 0;
            T *rounded = of_x_rounded + i * d, *out = y + i * d;
#pragma omp simd reduction(+ : dot)
            for (int64_t j = 0; j < d; ++j) {
                const float unit = (add ? from[j] + wide(add[j]) : from[j]) * factor, w = wide(weight[j]), of_out = wide(g[j]);
                out[j] = narrow(unit * w);
                of_mine[j] += of_out * unit;
                dot += of_out * w * unit;
            }
            dot /= d;
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) {
                const float unit = (add ? from[j] + wide(add[j]) : from[j]) * factor;
                to[j] += factor * (wide(g[j]) * wide(weight[j]) - unit * dot);
                rounded[j] = narrow(to[j]);
            }
        }
    }
    for (int64_t j = 0; j < d; ++j) of_weight[j] = 0;
    for (int t = 0; t < threads; ++t)
        for (int64_t j = 0; j < d; ++j) of_weight[j] += sums[t * d + j];
}

// The gradient of swiglu: of_out (n, d) and gate_up (n, 2 d) -> of_gate_up (n, 2 d); gives swiglu's result (n, d) once more.
void swiglu_backward(const T* of_out, const T* gate_up, T* of_gate_up, T* out, int64_t n, int64_t d) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; ++i) {
        const T *gate = gate_up + i * 2 * d, *up = gate + d, *grad = of_out + i * d;
        T *of_gate = of_gate_up + i * 2 * d, *of_up = of_gate + d, *to = out + i * d;
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) {
            const float g = wide(gate[j]), u = wide(up[j]), of = wide(grad[j]), open = sigmoid(g);
            of_gate[j] = narrow(of * u * open * (1.0f + g * (1.0f - open)));
            of_up[j] = narrow(of * g * open);
            to[j] = narrow(g * open * u);
        }
    }
}

// Rotary embedding in place of the first `turned` of `heads` heads of x (n, heads, e), token i at row i of cos and sin (n, e);
// `back` gives its gradient.
void rotate(T* x, const float* cos, const float* sin, int64_t n, int64_t turned, int64_t heads, int64_t e, int back) {
#pragma omp parallel
    {
        std::vector<float> other(e);  // the sine of the gradient
#pragma omp for
        for (int64_t i = 0; i < n; ++i) {
            const float* s = sin + i * e;
            if (back) {
                std::rotate_copy(s, s + e / 2, s + e, other.data());
                s = other.data();
            }
            for (int64_t h = 0; h < turned; ++h) rotate_head(x + (i * heads + h) * e, cos + i * e, s, e, x + (i * heads + h) * e);
        }
    }
}

}  // extern "C"
