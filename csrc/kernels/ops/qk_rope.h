// QK-norm, rotary embedding and query gain: parameters and launch functions.
#pragma once

#include "ops.h"

namespace pgolf {

// A row is one token, at position r % length; it holds the heads of q, then of k, then of v. With n(x) = x / sqrt(
// mean(x^2) + eps) over a head, and R the turn of columns i and i + half, i < half, by the position's angles:
// q = gain * R n(q), k = R n(k).
struct QkRopeForward {
    DType dtype;           // of qkv and out
    const void* qkv;       // [rows, heads + 2 kv_heads, head_dim]
    const float* gain;     // [heads]
    const float* cos;      // [length, half]
    const float* sin;      // [length, half]
    void* out;             // [rows, heads + kv_heads, head_dim]: q and k
    int64_t rows, length;  // rows at most 2^30
    int heads, kv_heads;
    int head_dim, half;  // head_dim a multiple of 8, at most 128; 2 half <= head_dim
    float eps;
};

// The gradient of one of the results: null where it is zero, else a head's columns and a row's heads side by side.
struct HeadsGrad {
    const void* data;  // [rows, heads or kv_heads, head_dim]
    int stride;        // values from row to row
};

struct QkRopeBackward {
    DType dtype;  // of qkv, its gradient and those of the results
    HeadsGrad grad_q, grad_k, grad_v, grad_v_self;
    const void* qkv;    // [rows, heads + 2 kv_heads, head_dim]
    const float* gain;  // [heads]
    const float* cos;   // [length, half]
    const float* sin;   // [length, half]
    void* grad_qkv;     // [rows, heads + 2 kv_heads, head_dim]
    float* grad_gain;   // [heads]; null: not wanted
    float* scratch;     // [qk_rope_scratch(rows, heads)], there where grad_gain is
    int64_t rows, length;
    int heads, kv_heads;
    int head_dim, half;
    float eps;
};

namespace generic {

// All tensors of `dtype` begin, row by row, at multiples of 16 bytes; where half is a multiple of 8, cos and sin too.
void qk_rope_forward(const QkRopeForward& params, cudaStream_t stream);
void qk_rope_backward(const QkRopeBackward& params, cudaStream_t stream);

// Floats of scratch that qk_rope_backward needs.
int64_t qk_rope_scratch(int64_t rows, int64_t heads);

}  // namespace generic
}  // namespace pgolf
