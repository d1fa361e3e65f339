// One step of AdamW on a flat tensor: parameters and launch function.
#pragma once

#include "ops.h"

namespace pgolf {

// For each value, g being the gradient and t the number of the step:
//   weight -= lr * weight_decay * weight
//   mean = beta1 * mean + (1 - beta1) * g;  square = beta2 * square + (1 - beta2) * g^2
//   weight -= lr / (1 - beta1^t) * mean / (sqrt(square / (1 - beta2^t)) + eps)
//   copy = weight, rounded
// Without `mean`, which is for beta1 = 0, g stands for it.
struct Adamw {
    DType grad_type, copy_type;
    float* weight;         // [size]
    float* mean;           // [size] or null
    float* square;         // [size]
    const void* grad;      // [size] of grad_type
    void* copy;            // [size] of copy_type, or null
    const int64_t* count;  // [1]: t, read on the device
    int64_t size;
    double lr, beta1, beta2, eps, weight_decay;
};

namespace generic {

void adamw(const Adamw& params, const Target& target);

}  // namespace generic
}  // namespace pgolf
