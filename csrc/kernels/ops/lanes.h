// Two residual lanes that two branches write to: parameters and launch functions.
#pragma once

#include "ops.h"

namespace pgolf {

// For each row, with A = attn_scale * a and M = mlp_scale * m:
//   out_j = resid[j] * lane_j + post[0, j] * A + post[1, j] * M,  j = 0, 1
// All pointers but `post` and `resid` are aligned to 16 bytes.
struct LanesInputs {
    DType dtype;              // of all activations
    const void* lane[2];      // [rows, dim]
    const void* a;            // [rows, dim]
    const void* m;            // [rows, dim]
    const float* attn_scale;  // [dim]
    const float* mlp_scale;   // [dim]
    const float* post;        // [2, 2]
    const float* resid;       // [2]
    int64_t rows;
    int dim;  // a multiple of 8, at most kLanesMaxDim
};

struct LanesForward {
    LanesInputs in;
    void* out[2];  // [rows, dim]
};

struct LanesBackward {
    LanesInputs in;
    const void* grad_out[2];  // [rows, dim]; null counts as zeros
    void* grad_lane[2];       // [rows, dim]
    void* grad_a;             // [rows, dim]
    void* grad_m;             // [rows, dim]
    float* grad_parameters;   // [lanes_parameters]: of attn_scale, mlp_scale, post and resid; null: not wanted
    float* scratch;           // [lanes_scratch], there where grad_parameters is
};

constexpr int kLanesMaxDim = 1024;

constexpr int lanes_parameters(int dim) { return 2 * dim + 6; }

namespace generic {

void lanes_forward(const LanesForward& params, const Target& target);
void lanes_backward(const LanesBackward& params, const Target& target);

// Floats of scratch that lanes_backward needs on the current device.
int64_t lanes_scratch(int64_t rows, int dim);

}  // namespace generic
}  // namespace pgolf
