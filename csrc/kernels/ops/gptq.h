// GPTQ: parameters and launch function.
#pragma once

#include "ops.h"

namespace pgolf {

// For every matrix, columns in order: column j is rounded, q = clamp(round(w / s), -m, m), and its error
// e = (w - q s) / U[j, j] repaid by the columns behind it, w[c] -= e U[j, c] for c > j. The step s and the largest
// integer m of a column are those of its group. float64 throughout.
struct Gptq {
    const float* weight;   // [matrices, rows, cols]
    const double* factor;  // [matrices, cols, cols]; U, of which only the upper triangle is used
    const float* scale;    // [groups, matrices, rows]
    const uint8_t* group;  // [matrices, cols], below `groups`
    const int* limit;      // [groups, matrices]
    int8_t* q;             // [matrices, rows, cols]
    double* errors;        // scratch [matrices, rows, cols]
    int64_t matrices, rows;
    int cols, groups;
};

namespace generic {

void gptq(const Gptq& params, cudaStream_t stream);

}  // namespace generic
}  // namespace pgolf
