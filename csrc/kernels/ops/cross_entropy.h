// Cross-entropy of softcapped logits, fused with the product that makes the logits: parameters and launch functions.
//
// For a row h and its target t: u = weight h, z = cap tanh(u / cap), loss = log(sum_v exp(z_v)) - z_t. |z| <= cap, so
// exp(z) of any cap up to kMaxSoftcap and its sum over a vocabulary fit float32 and bfloat16: no maximum is subtracted,
// the softmax stays unnormalized, and the product writes, in one pass, all that the backward needs of a logit:
//   terms = exp(z) (1 - tanh(u / cap)^2) / 4.
// With S = sum_v exp(z_v) and w the weight of the row's loss, w terms 4 / S is the gradient of u, except at the target,
// where p_t - 1 stands in place of p_t. S is only known when a row's last tile is; by then the terms are written, so
// what is scaled by 4 w / S is the other factor of each product: h in grad_weight = terms^T (h 4 w / S), and the rows
// of grad_h = (terms weight) 4 w / S.
//
// The sums leave the target out: p_t - 1 = -(sum of the others) / S is then exact for p_t as close to 1 as may be, and
// so is the loss, log1p(others / exp(z_t)).
#pragma once

#include "ops.h"

namespace pgolf {

constexpr float kMaxSoftcap = 64.0f;
constexpr int kCrossEntropyTile = 128;  // columns of a partial sum

// The number of partial sums of a row.
inline int cross_entropy_tiles(int vocab) { return (vocab + kCrossEntropyTile - 1) / kCrossEntropyTile; }

// The product. Two forms: with `terms`, one cap; without, caps read from the device.
struct CrossEntropyLogits {
    const void* h;           // [rows, dim] bfloat16
    const void* weight;      // [vocab, dim] bfloat16
    const int64_t* targets;  // [rows]
    float cap;               // of the form with terms: 0 < cap <= kMaxSoftcap
    const float* caps;       // [2], of the form without: the cap where u > 0, and elsewhere
    void* terms;             // [rows, vocab] bfloat16, or null
    float* sums;             // [cross_entropy_tiles(vocab), rows]: exp(z) over a tile's columns, without the target's
    int64_t rows;
    int vocab, dim;  // multiples of 8
};

// The rows, after the product; forms as above. A target outside [0, vocab) makes its row's results NaN.
struct CrossEntropyRows {
    const void* h;           // [rows, dim] bfloat16
    const void* weight;      // [vocab, dim] bfloat16
    const int64_t* targets;  // [rows]
    float cap;
    const float* caps;  // [2]; a cap outside (0, kMaxSoftcap] makes every loss NaN
    const float* sums;  // of the product
    float loss_weight;  // w
    void* terms;        // [rows, vocab] bfloat16, or null: the target's is written here
    void* scaled_h;     // [rows, dim] bfloat16: h 4 w / S; null: not wanted
    float* row_scale;   // [rows]: 4 w / S
    float* losses;      // [rows]
    int64_t rows;
    int vocab, dim;
};

// out = x * row_scale[row] * grad, rounded to bfloat16.
struct CrossEntropyScale {
    DType dtype;             // of x
    const void* x;           // [rows, dim]
    const float* row_scale;  // [rows], or null: 1
    const float* grad;       // [1], gradient of the loss
    void* out;               // [rows, dim] bfloat16
    int64_t rows;
    int dim;  // a multiple of 8
};

// Pointers to matrices are 16-byte aligned.
namespace generic {
void cross_entropy_logits(const CrossEntropyLogits& params, const Target& target);
void cross_entropy_rows(const CrossEntropyRows& params, cudaStream_t stream);
void cross_entropy_scale(const CrossEntropyScale& params, cudaStream_t stream);
}  // namespace generic

namespace sm90 {
void cross_entropy_logits(const CrossEntropyLogits& params, const Target& target);
}  // namespace sm90

}  // namespace pgolf
