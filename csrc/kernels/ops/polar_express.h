// Muon's direction: parameters, launch functions, and the order of the products that both builds share.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "ops.h"

namespace pgolf {

// For every matrix of the batch, with every operation rounded to bfloat16:
//   g = grad; momentum = mu * momentum + g; u = g + lookahead * momentum;
//   each row of u over its norm (at least `floor`); all over the Frobenius norm plus `floor`: x, transposed when tall;
//   then for each (a, b, c): gram = x x^T; polynomial = b * gram + c * (gram gram); x = a * x + polynomial x.
struct PolarExpress {
    DType grad_type;
    const void* grad;            // [batch, rows, cols], bfloat16 or float32
    void* momentum;              // [batch, rows, cols], bfloat16
    void* out;                   // [batch, rows, cols], bfloat16
    void* scratch;               // polar_express_scratch(batch, rows, cols) bytes, aligned to 256
    int batch, rows, cols;       // batch at most 65535, rows and cols multiples of 8, cols at most kPolarExpressCols
    float mu, lookahead, floor;  // lookahead: mu rounded to bfloat16
    std::vector<std::array<float, 3>> coefficients;
};

constexpr int kPolarExpressCols = 4096;  // a warp keeps a row in registers

// The matrices in the wide orientation. Both x and its transpose are kept, so that every product is left right^T.
// A step reads transposed[step % 2] and writes the other; x is updated in place.
struct PolarExpressBuffers {
    int side, length;     // side <= length
    void* x;              // [batch, side, length]; `out` unless tall
    void* transposed[2];  // [batch, length, side]; the one that the last step writes is `out` when tall
    void* gram;           // [batch, side, side]
    void* polynomial;     // [batch, side, side]
    float* squares;       // [batch, rows]: sums of squares of the normalized rows
    int64_t bytes;        // of scratch, all together
};

inline PolarExpressBuffers polar_express_buffers(const PolarExpress& p) {
    const bool tall = p.rows > p.cols;
    PolarExpressBuffers b{.side = std::min(p.rows, p.cols), .length = std::max(p.rows, p.cols)};
    const uintptr_t start = reinterpret_cast<uintptr_t>(p.scratch);
    uintptr_t next = start;
    const auto take = [&](int64_t bytes) {
        void* const piece = reinterpret_cast<void*>(next);
        next += (bytes + 255) / 256 * 256;
        return piece;
    };
    const int64_t matrix = int64_t{2} * p.batch * p.rows * p.cols, square = int64_t{2} * p.batch * b.side * b.side;
    const size_t last = p.coefficients.size() % 2;
    b.x = tall ? take(matrix) : p.out;
    b.transposed[1 - last] = take(matrix);
    b.transposed[last] = tall ? p.out : take(matrix);
    b.gram = take(square);
    b.polynomial = take(square);
    b.squares = static_cast<float*>(take(int64_t{4} * p.batch * p.rows));
    b.bytes = static_cast<int64_t>(next - start);
    return b;
}

inline int64_t polar_express_scratch(int batch, int rows, int cols) {
    return polar_express_buffers({.batch = batch, .rows = rows, .cols = cols}).bytes;
}

// out = source_scale * source + product_scale * (left right^T), or left right^T where there is no source, for every
// matrix of the batch. Both terms' factors and the terms are rounded to bfloat16 before the sum is.
struct PolarExpressProduct {
    const void *left, *right;  // [rows, depth], [cols, depth]
    const void* source;        // [rows, cols] or null
    void* out;                 // [rows, cols], may be source; null: not wanted
    void* transposed;          // [cols, rows]; null: not wanted
    int rows, cols, depth;
    bool symmetric;  // out == transposed: only tiles on and above the diagonal are computed, those above it mirrored
    float source_scale, product_scale;
};

// Call multiply(product) for every product of the iteration, in order.
template <typename Multiply>
void polar_express_steps(const PolarExpress& p, const PolarExpressBuffers& b, const Multiply& multiply) {
    const bool tall = p.rows > p.cols;
    const size_t steps = p.coefficients.size();
    for (size_t step = 0; step < steps; ++step) {
        const auto [c1, c3, c5] = p.coefficients[step];
        const bool last = step + 1 == steps;
        multiply(PolarExpressProduct{.left = b.x,
                                     .right = b.x,
                                     .out = b.gram,
                                     .transposed = b.gram,
                                     .rows = b.side,
                                     .cols = b.side,
                                     .depth = b.length,
                                     .symmetric = true});
        multiply(PolarExpressProduct{.left = b.gram,
                                     .right = b.gram,
                                     .source = b.gram,
                                     .out = b.polynomial,
                                     .transposed = b.polynomial,
                                     .rows = b.side,
                                     .cols = b.side,
                                     .depth = b.side,
                                     .symmetric = true,
                                     .source_scale = c3,
                                     .product_scale = c5});
        multiply(PolarExpressProduct{.left = b.polynomial,
                                     .right = b.transposed[step % 2],
                                     .source = b.x,
                                     .out = last && tall ? nullptr : b.x,
                                     .transposed = last && !tall ? nullptr : b.transposed[(step + 1) % 2],
                                     .rows = b.side,
                                     .cols = b.length,
                                     .depth = b.side,
                                     .symmetric = false,
                                     .source_scale = c1,
                                     .product_scale = 1.0f});
    }
}

namespace generic {

void polar_express(const PolarExpress& params, const Target& target);

// All that comes before the products: the momentum, and x with its transpose. The sm90 build uses it too.
void polar_express_prepare(const PolarExpress& params, const PolarExpressBuffers& buffers, cudaStream_t stream);

}  // namespace generic

namespace sm90 {

void polar_express(const PolarExpress& params, const Target& target);

}  // namespace sm90
}  // namespace pgolf
