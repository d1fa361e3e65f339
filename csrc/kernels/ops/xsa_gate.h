// XSA and the heads' gates: parameters and launch functions.
#pragma once

#include "ops.h"

namespace pgolf {

// out = gate * (y - (y . u) u) for each head of y, u = v / max(|v|, 1e-12) of the head of v that it shares with the
// other heads of its group: heads j * group to (j + 1) * group - 1 share head j. Without v: out = gate * y; without
// gate: as if it were 1.
struct XsaGateForward {
    DType dtype;       // of all tensors
    const void* y;     // [rows, kv_heads * group, head_dim]
    const void* v;     // [rows, kv_heads, head_dim] with v_stride values from row to row, or null
    const void* gate;  // [rows, kv_heads * group], or null
    void* out;         // [rows, kv_heads * group, head_dim]
    int64_t v_stride;
    int64_t rows;  // rows * kv_heads * group at most 2^30
    int kv_heads, group;
    int head_dim;  // a multiple of 8, at most 128
};

struct XsaGateBackward {
    DType dtype;
    const void* grad;  // [rows, kv_heads * group, head_dim], gradient of `out`
    const void* y;     // as in the forward
    const void* v;
    const void* gate;
    void* grad_y;     // [rows, kv_heads * group, head_dim]
    void* grad_v;     // [rows, kv_heads, head_dim]; null: not wanted, or there is no v
    void* grad_gate;  // [rows, kv_heads * group]; null: not wanted
    int64_t v_stride;
    int64_t rows;
    int kv_heads, group;
    int head_dim;
};

namespace generic {

// All tensors but gate and grad_gate begin, row by row, at multiples of 16 bytes.
void xsa_gate_forward(const XsaGateForward& params, cudaStream_t stream);
void xsa_gate_backward(const XsaGateBackward& params, cudaStream_t stream);

}  // namespace generic
}  // namespace pgolf
