// The fused MLP products: parameters and launch functions. All matrices are bfloat16, row-major, 16-byte aligned.
#pragma once

#include "ops.h"

namespace pgolf {

// hidden = leaky_relu(x weight^T, 0.5)^2, with bit c % 8 of signs[r, c / 8] set where (x weight^T)[r, c] is negative.
// `hidden` and the sign are all that the backward needs: the slope at x is 2 sqrt(hidden), or -sqrt(hidden) where x <
// 0.
struct MlpUp {
    const void* x;       // [rows, dim]
    const void* weight;  // [features, dim]
    void* hidden;        // [rows, features]
    uint8_t* signs;      // [features / 128, rows, 16]
    int64_t rows;
    int features, dim;  // features a multiple of 128, dim of 8
};

// grad_pre = (grad weight^T) * slope, the gradient of x weight_up^T; `weight` is the down-projection transposed.
struct MlpGrad {
    const void* grad;      // [rows, dim], gradient of the MLP's output
    const void* weight;    // [features, dim]
    const void* hidden;    // [rows, features], of MlpUp
    const uint8_t* signs;  // [features / 128, rows, 16], of MlpUp
    void* grad_pre;        // [rows, features]
    int64_t rows;
    int features, dim;
};

namespace generic {
void mlp_up(const MlpUp& params, const Target& target);
void mlp_grad(const MlpGrad& params, const Target& target);
}  // namespace generic

namespace sm90 {
void mlp_up(const MlpUp& params, const Target& target);
void mlp_grad(const MlpGrad& params, const Target& target);
}  // namespace sm90

}  // namespace pgolf
