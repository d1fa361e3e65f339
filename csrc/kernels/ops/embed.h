// Embedding, SmearGate and RMS-norm in one: parameters and launch functions.
#pragma once

#include "ops.h"

namespace pgolf {

// With e[r] = weight[ids[r]] and, where row r is not the first of its sequence and ids[r] is not `bos`,
//   s[r] = e[r] + lambda * sigmoid(gate_weight . e[r, :window]) * e[r - 1], otherwise s[r] = e[r]:
//   out[r] = s[r] * rstd[r], rstd[r] = 1 / sqrt(mean(s[r]^2) + eps).
// A row is one token: sequence r / length, position r % length. Rows that need an id outside [0, vocab) are NaN.
struct EmbedForward {
    DType dtype;               // of weight and out
    const int64_t* ids;        // [rows]
    const void* weight;        // [vocab, dim]
    const float* gate_weight;  // [window]
    const float* lambda;       // [1]
    void* out;                 // [rows, dim]
    float* statistics;         // [2, rows]: rstd; sigmoid, -1 where nothing is added
    int64_t rows;              // fewer than 2^31
    int length;                // divides rows
    int dim, window, vocab;    // window <= dim
    int64_t bos;
    float eps;
};

// Every row of grad_weight is written; rows of ids that do not occur are zeros. Ids outside [0, vocab) add to no row.
struct EmbedBackward {
    DType dtype;               // of grad and weight
    DType grad_dtype;          // of grad_weight: float32, or `dtype`
    const void* grad;          // [rows, dim], gradient of `out`
    const int64_t* ids;        // [rows]
    const void* weight;        // [vocab, dim]
    const float* gate_weight;  // [window]
    const float* lambda;       // [1]
    const float* statistics;   // [2, rows], of EmbedForward
    void* grad_weight;         // [vocab, dim]
    float* grad_gate_weight;   // [window]
    float* grad_lambda;        // [1]
    void* scratch;             // [embed_scratch(rows, dim, vocab)], aligned to 32 bytes
    int64_t rows;              // fewer than 2^31
    int dim, window, vocab;    // vocab at most kEmbedMaxVocab
};

constexpr int kEmbedMaxVocab = 1 << 18;

namespace generic {

void embed_forward(const EmbedForward& params, const Target& target);
void embed_backward(const EmbedBackward& params, const Target& target);

// Four-byte words of scratch that embed_backward needs.
int64_t embed_scratch(int64_t rows, int dim, int vocab);

}  // namespace generic
}  // namespace pgolf
