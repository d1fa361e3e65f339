// Trellis-coded GPTQ: parameters and launch function.
#pragma once

#include "ops.h"

namespace pgolf {

// Many matrices, of any shapes, one behind the other in every array; what each array holds, and every bit of the
// result, is as in csrc/trellis/quantize.h.
struct Trellis {
    float* work;                 // each [cols, rows]: the weights; left behind are errors
    const float* upper;          // each [cols, cols]
    const float* row_step;       // each [rows]
    const float* row_variance;   // each [rows]
    const float* column_factor;  // each [cols]
    uint32_t* words;             // scratch: each trellis_scratch(rows, states)
    int8_t* levels;              // each [cols, rows]
    const int* rows;             // [matrices], read by the host
    const int* cols;
    int matrices;
    int states;  // 4, 8, 32, 64 or 256
    float rate;
};

namespace generic {

// Words of scratch that one matrix takes.
int64_t trellis_scratch(int rows, int states);

void trellis(const Trellis& params, const Target& target);

}  // namespace generic
}  // namespace pgolf
