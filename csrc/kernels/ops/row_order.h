// Greedy nearest-neighbour order of the rows of a matrix: parameters and launch function.
#pragma once

#include "ops.h"

namespace pgolf {

// order[0] = 0; order[s + 1] is the row not yet in the order with the smallest L1 distance to row order[s], and of
// several the one with the lowest number.
struct RowOrder {
    const int8_t* q;      // [rows, cols]
    uint32_t* distances;  // scratch, [row_order_scratch(rows)], aligned to 16 bytes
    int64_t* order;       // [rows]
    int rows;             // at most kRowOrderMaxRows
    int cols;             // at most kRowOrderMaxCols
};

constexpr int kRowOrderMaxRows = 1 << 16;
constexpr int kRowOrderMaxCols = 1 << 20;

namespace generic {

void row_order(const RowOrder& params, const Target& target);

// 32-bit words of scratch: the distances of all pairs, 256 MiB for 8,192 rows and 16 GiB for 65,536.
int64_t row_order_scratch(int rows);

}  // namespace generic
}  // namespace pgolf
