// The residual stream between two branches, with the norm and the gate that follow: parameters and launch functions.
#pragma once

#include "ops.h"

namespace pgolf {

// For each row, with what is null left out:
//   s = x + branch_scale * branch
//   t = skip_weight * skip + sigmoid(skip_gate) * (s - skip_weight * skip), skip = s where it is null beside a weight
//   u = mix[0] * t + mix[1] * x0
//   n = norm_scale * u / sqrt(mean(u^2) + eps)
//   g[h] = sigmoid(gate_scale * sum over c < window of n[c] * gate_weight[h, c]), n as rounded to `dtype`
// All pointers are aligned to 16 bytes.
struct ResidualInputs {
    DType dtype;                // of all activations
    const void* x;              // [rows, dim]
    const void* branch;         // [rows, dim] or null
    const void* skip;           // likewise
    const void* x0;             // likewise
    const float* branch_scale;  // [dim]; null: ones
    const float* skip_weight;   // [dim] or null
    const float* skip_gate;     // [dim], there where skip_weight is
    const float* mix;           // [2, dim], there where x0 is
    const float* gate_weight;   // [heads, window] or null
    int64_t rows;
    int dim;            // a multiple of 8, at most kResidualMaxDim
    int heads, window;  // at most kResidualMaxGate, their product at most kResidualMaxGateWeights; window <= dim
    float gate_scale, norm_scale, eps;
};

struct ResidualForward {
    ResidualInputs in;
    void* sum;     // s [rows, dim] or null
    void* blend;   // t [rows, dim] or null
    void* stream;  // u [rows, dim] or null
    void* normed;  // n [rows, dim]
    void* gate;    // g [rows, heads], there where gate_weight is
};

// Gradients of results that are null count as zeros; those of operands that may be null are then not wanted. Without
// rows nothing is written.
struct ResidualBackward {
    ResidualInputs in;
    const void* gate;         // g [rows, heads], there where grad_gate is
    const void* grad_sum;     // [rows, dim], as the next three
    const void* grad_blend;   // of t; null without x0, where t is u
    const void* grad_stream;  // of u
    const void* grad_normed;  // of n
    const void* grad_gate;    // [rows, heads], of g
    const void* grad_x0_out;  // [rows, dim]: what else grad_x0 is the sum of
    void* grad_x;             // [rows, dim]
    void* grad_branch;        // [rows, dim] or null
    void* grad_skip;          // [rows, dim], there where `skip` is
    void* grad_x0;            // [rows, dim] or null
    float* grad_parameters;   // [residual_parameters] or null
    float* scratch;           // [residual_scratch], there where grad_parameters is
};

constexpr int kResidualMaxDim = 1024;
constexpr int kResidualMaxGate = 32;
constexpr int kResidualMaxGateWeights = 512;  // so that shared memory of 99 KiB has room for all else

// What grad_parameters holds, one after the other: of branch_scale, skip_weight, skip_gate, mix and gate_weight, those
// that are there (branch_scale where `branch` is).
constexpr int residual_parameters(bool branch, bool skip, bool mix, int dim, int heads, int window) {
    return (branch + 2 * skip + 2 * mix) * dim + heads * window;
}

namespace generic {

void residual_forward(const ResidualForward& params, const Target& target);
void residual_backward(const ResidualBackward& params, const Target& target);

// Floats of scratch that residual_backward needs on the current device.
int64_t residual_scratch(int64_t rows, int dim, int parameters);

}  // namespace generic
}  // namespace pgolf
