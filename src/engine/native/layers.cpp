// Everything that a Llama-like model computes between its matrix products, except attention, and the
// gradients. Each function makes one pass over memory. n is the number of tokens, and d is the hidden or
// inner size.

#include "numbers.h"

extern "C" {

// Add delta (n, d) to the residual stream x (n, d) and normalize the result. Without a delta (nullptr), x
// itself is normalized and `sum` is not written.
//
// Writes sum (n, d) float32, its RMSNorm y (n, d), and scale (n) = 1 / root mean square.
void add_norm(const float* x, const T* delta, const T* weight, float eps, float* sum, T* y, float* scale,
              int64_t n, int64_t d) {
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

// gate_up (n, 2 d), with gate and up side by side -> silu(gate) * up (n, d).
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

// The gradient of add_norm's y with respect to x and weight. Takes d_y (n, d), the x, delta and weight that
// add_norm was given, and the scale that it wrote.
//
// Adds the gradient to d_x (n, d) float32 and writes the new d_x, rounded, to d_x_rounded (n, d). Also writes
// d_weight (d) and the recomputed y (n, d).
void norm_backward(const T* d_y, const float* x, const T* delta, const float* scale, const T* weight,
                   float* d_x, T* d_x_rounded, T* y, float* d_weight, int64_t n, int64_t d) {
    const int threads = omp_get_max_threads();
    // Each thread sums d_weight over its own tokens. The sums are then added in a fixed order, so every run
    // gives the same bits.
    std::vector<float> sums(threads * d);
#pragma omp parallel num_threads(threads)
    {
        float* thread_sum = &sums[omp_get_thread_num() * d];
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) {
            const T *g = d_y + i * d, *add = delta ? delta + i * d : nullptr;
            const float *from = x + i * d, factor = scale[i];
            float *to = d_x + i * d, dot = 0;
            T *rounded = d_x_rounded + i * d, *out = y + i * d;
#pragma omp simd reduction(+ : dot)
            for (int64_t j = 0; j < d; ++j) {
                const float unit = (add ? from[j] + wide(add[j]) : from[j]) * factor;
                const float w = wide(weight[j]), d_out = wide(g[j]);
                out[j] = narrow(unit * w);
                thread_sum[j] += d_out * unit;
                dot += d_out * w * unit;
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
    for (int64_t j = 0; j < d; ++j) d_weight[j] = 0;
    for (int t = 0; t < threads; ++t)
        for (int64_t j = 0; j < d; ++j) d_weight[j] += sums[t * d + j];
}

// The gradient of swiglu: d_out (n, d) and gate_up (n, 2 d) -> d_gate_up (n, 2 d). Also writes swiglu's
// recomputed result, `out` (n, d).
void swiglu_backward(const T* d_out, const T* gate_up, T* d_gate_up, T* out, int64_t n, int64_t d) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; ++i) {
        const T *gate = gate_up + i * 2 * d, *up = gate + d, *grad = d_out + i * d;
        T *d_gate = d_gate_up + i * 2 * d, *d_up = d_gate + d, *to = out + i * d;
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) {
            const float g = wide(gate[j]), u = wide(up[j]), d_o = wide(grad[j]), s = sigmoid(g);
            d_gate[j] = narrow(d_o * u * s * (1.0f + g * (1.0f - s)));
            d_up[j] = narrow(d_o * g * s);
            to[j] = narrow(g * s * u);
        }
    }
}

// Apply the rotary embedding, in place, to the first `rotated` heads of x (n, heads, head_dim). Token i uses
// row i of cos and sin (n, head_dim). If `backward` is set, x holds gradients and the inverse rotation is
// applied.
void rotate(T* x, const float* cos, const float* sin, int64_t n, int64_t rotated, int64_t heads,
            int64_t head_dim, int64_t backward) {
#pragma omp parallel
    {
        std::vector<float> inverse(head_dim);  // the sine of the inverse rotation
#pragma omp for
        for (int64_t i = 0; i < n; ++i) {
            const float* s = sin + i * head_dim;
            if (backward) {
                std::rotate_copy(s, s + head_dim / 2, s + head_dim, inverse.data());
                s = inverse.data();
            }
            for (int64_t h = 0; h < rotated; ++h) {
                T* head = x + (i * heads + h) * head_dim;
                rotate_head(head, cos + i * head_dim, s, head_dim, head);
            }
        }
    }
}

}  // extern "C"
