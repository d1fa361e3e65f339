// SmearGate: parameters and launch functions.
#pragma once

#include "ops.h"

namespace pgolf {

// out[r] = e[r] + lambda * sigmoid(weight . e[r, :window]) * e[r - 1], where row r is not the first of its sequence
// and ids[r] is not `bos`; otherwise out[r] = e[r]. A row is one token: sequence r / length, position r % length.
struct SmearGateForward {
    DType dtype;           // of e and out
    const void* e;         // [rows, dim]
    const int64_t* ids;    // [rows]
    const float* weight;   // [window]
    const float* lambda;   // [1]
    void* out;             // [rows, dim]
    int64_t rows, length;  // length divides rows
    int dim, window;       // window <= dim
    int64_t bos;
};

struct SmearGateBackward {
    DType dtype;          // of grad, e and grad_e
    const void* grad;     // [rows, dim], gradient of `out`
    const void* e;        // [rows, dim]
    const int64_t* ids;   // [rows]
    const float* weight;  // [window]
    const float* lambda;  // [1]
    void* grad_e;         // [rows, dim]
    float* grad_weight;   // [window]; null, as the next two: not wanted
    float* grad_lambda;   // [1]
    float* scratch;       // [smear_gate_scratch(rows, window)]
    int64_t rows, length;
    int dim, window;
    int64_t bos;
};

namespace generic {

void smear_gate_forward(const SmearGateForward& params, cudaStream_t stream);
void smear_gate_backward(const SmearGateBackward& params, cudaStream_t stream);

// Floats of scratch that smear_gate_backward needs.
int64_t smear_gate_scratch(int64_t rows, int64_t window);

}  // namespace generic
}  // namespace pgolf
