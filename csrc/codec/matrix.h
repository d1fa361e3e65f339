// Coding of int8 matrices with near-Gaussian entries, many rows of one length to a stream.
#pragma once

#include <span>

#include "model.h"

namespace pgolf::codec {

struct Shape {
    std::size_t rows, columns;
    bool operator==(const Shape&) const = default;
    std::size_t count() const { return rows * columns; }
};

// Matrices [first, last) of a list, coded as one stream.
struct Range {
    std::size_t first, last;
};

// Consecutive matrices of equal shape share a stream, and what was learned on the first ones, up to this many entries:
// a fixed rule, so that the bytes do not depend on the number of threads.
constexpr std::size_t kStreamEntries = std::size_t{1} << 21;
std::vector<Range> plan_streams(std::span<const Shape> shapes);

// A valid stream holds at most this many entries a byte: an entry takes at least two decisions, also where its parity
// is known (see kMinProbability).
constexpr std::size_t kMaxEntriesPerByte = 8192;

struct Stream {
    std::vector<std::uint8_t> bytes;
    std::vector<std::size_t> ends;  // where in `bytes` each matrix's part ends, to the byte below; the last at the end
};

// Codes `matrices`, all of `shape`, row-major.
Stream encode_stream(std::span<const std::int8_t* const> matrices, Shape shape);

// Fills `matrices` and returns the stream's `ends`; throws StreamError on a stream that no encoder wrote, after bounded
// work.
std::vector<std::size_t> decode_stream(std::span<const std::uint8_t> stream, std::span<std::int8_t* const> matrices,
                                       Shape shape);

}  // namespace pgolf::codec
