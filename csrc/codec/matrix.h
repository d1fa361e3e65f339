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
constexpr std::size_t kStreamEntries = std::size_t{1} << 22;
std::vector<Range> plan_streams(std::span<const Shape> shapes);

// A valid stream holds at most this many entries a byte: an entry takes at least two decisions (see kMinProbability).
constexpr std::size_t kMaxEntriesPerByte = 8192;

// Codes `matrices`, all of `shape`, row-major.
std::vector<std::uint8_t> encode_stream(std::span<const std::int8_t* const> matrices, Shape shape);

// Fills `matrices`; throws StreamError on a stream that no encoder wrote, after bounded work.
void decode_stream(std::span<const std::uint8_t> stream, std::span<std::int8_t* const> matrices, Shape shape);

}  // namespace pgolf::codec
