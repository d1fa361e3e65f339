// GPTQ's column loop (arXiv:2210.17323) with a trellis search in place of rounding.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pgolf::trellis {

// One matrix, columns in the order of processing, each contiguous.
struct Problem {
    std::size_t rows, cols;
    float* work;                 // [cols, rows]: the weights; the loop moves later columns by earlier ones' errors
    const float* upper;          // [cols, cols]: U, where U^T U is the inverse Hessian
    const float* row_step;       // [rows]: 0 for a row that is stored as zeros
    const float* row_variance;   // [rows]: mean over columns of (weight / row_step)^2
    const float* column_factor;  // [cols], positive
    float rate;                  // what a bit costs, in squared steps
    std::size_t block;           // columns whose errors are gathered; changes the time and nothing else
};

bool known(int states);

// Writes levels [cols, rows]. `states` is one of those known.
void quantize(const Problem& problem, int states, std::int8_t* levels);

}  // namespace pgolf::trellis
