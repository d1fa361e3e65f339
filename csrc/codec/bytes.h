// Coding of general bytes (scales, small tensors, source text): contexts of up to six bytes, mixed.
#pragma once

#include <span>

#include "model.h"

namespace pgolf::codec {

// A valid stream holds at most this many bytes a byte: a byte takes eight decisions (see kMinProbability).
constexpr std::size_t kMaxBytesPerByte = 2048;

std::vector<std::uint8_t> encode_bytes(std::span<const std::uint8_t> data);

// Fills `data`; throws StreamError on a stream that no encoder wrote.
void decode_bytes(std::span<const std::uint8_t> stream, std::span<std::uint8_t> data);

}  // namespace pgolf::codec
