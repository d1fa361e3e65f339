// Trellises of trellis-coded quantization: a column's earlier entries decide whether its next one is even or odd.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace pgolf::codec {

// Down a column, from state s = 0, an entry is t = 2k + (s & 1) for some integer k, whose lowest bit moves the state:
// s = (s >> 1) ^ (s & 1 ? h0 >> 1 : 0) ^ (k & 1 ? h1 >> 1 : 0). In the plain kind entries are free: t = k, s stays 0.
struct Trellis {
    int shift;             // entries allowed in a state are 2^shift apart
    std::uint8_t odd_s{};  // h0 >> 1
    std::uint8_t odd_k{};  // h1 >> 1

    int entry(std::uint8_t state, int k) const { return k * (1 << shift) + (state & 1); }

    // The inverse, rounded down: k of an entry that the state allows. Entries and k may both be scaled by `one`.
    int index(std::uint8_t state, int entry, int one = 1) const { return (entry - (state & 1) * one) >> shift; }

    bool allows(std::uint8_t state, int entry) const { return shift == 0 || ((entry ^ state) & 1) == 0; }

    std::uint8_t next(std::uint8_t state, int k) const {
        return static_cast<std::uint8_t>((state >> 1) ^ (-(state & 1) & odd_s) ^ (-(k & 1) & odd_k));
    }
};

constexpr int kKindBits = 3;  // a stream names its kind by an index into the list

// Plain, then 4, 8, 32, 64 and 256 states, with Ungerboeck's polynomials (h0, h1) in octal.
constexpr std::array<Trellis, 6> kTrellises = {{
    {0},
    {1, 05 >> 1, 02 >> 1},
    {1, 013 >> 1, 04 >> 1},
    {1, 045 >> 1, 010 >> 1},
    {1, 0103 >> 1, 024 >> 1},
    {1, 0515 >> 1, 0362 >> 1},
}};

}  // namespace pgolf::codec
