// The Viterbi search: the cheapest sequence of levels t that a trellis allows for one column of a matrix.
//
// Down the rows, from state s = 0: t = 2k + (s & 1), then s = (s >> 1) ^ (s & 1 ? h0 >> 1 : 0) ^ (k & 1 ? h1 >> 1 : 0).
// A level costs weight * (target - t)^2. Everything is float32 with each operation rounded on its own (the build turns
// contraction off), in four lanes as every x86-64 and aarch64 has them: the levels are the same on every machine.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace pgolf::trellis {

constexpr float kMaxLevel = 127;

typedef float Float4 __attribute__((vector_size(16)));
typedef float Float2 __attribute__((vector_size(8)));
typedef std::int32_t Int4 __attribute__((vector_size(16)));
typedef std::int32_t Int2 __attribute__((vector_size(8)));

inline Float4 load4(const float* from) { return Float4{from[0], from[1], from[2], from[3]}; }

// The four classes of levels, lane = t mod 4 = 2 (k & 1) + (s & 1): what a transition may choose from. Of each class
// the level nearest to the target, and its cost; the smaller magnitude wins a tie, then the negative one.
struct Nearest {
    Float4 level, cost;

    Nearest(float target, float weight) {
        constexpr Float4 offset{0, 1, 2, 3};
        constexpr float round = 12582912;  // 1.5 * 2^23: adding it rounds to an integer
        const Float4 quarter = (std::clamp(target, -kMaxLevel, kMaxLevel) - offset) * 0.25f;
        Float4 below = (quarter + round) - round;
        below = below > quarter ? below - 1.0f : below;
        Float4 low = 4.0f * below + offset, high = low + 4.0f;
        low = low < -kMaxLevel ? low + 4.0f : low;
        high = high > kMaxLevel ? high - 4.0f : high;
        const Float4 to_low = target - low, to_high = target - high;
        const Float4 cost_low = weight * (to_low * to_low), cost_high = weight * (to_high * to_high);
        const auto take_low = (cost_low < cost_high) | ((cost_low == cost_high) & (low * low <= high * high));
        level = take_low ? low : high;
        cost = take_low ? cost_low : cost_high;
    }
};

template <int kStates, int kH0, int kH1>
class Search {
  public:
    // Writes the levels of the rows' targets and weights. Ties between paths go to even k, at the end to the lowest
    // state.
    void operator()(const float* target, const float* weight, std::size_t rows, std::int8_t* levels) {
        level_.resize(rows);
        odd_.resize(rows);
        Costs cost;
        std::fill_n(&cost[0], 2 * kBlocks, kUnreachable - Lanes{});
        cost[0][0] = 0;
        for (std::size_t r = 0; r < rows; ++r) {
            const Nearest nearest(target[r], weight[r]);
            level_[r] = nearest.level;
            advance(cost, nearest.cost, odd_[r]);
        }
        int state = 0;
        for (int s = 1; s < kStates; ++s)
            if (at(cost, s) < at(cost, state)) state = s;
        for (std::size_t r = rows; r-- > 0;) {
            const int block = state / kLanes, lane = state % kLanes,
                      odd = odd_[r].word[block / 32][lane] >> block % 32 & 1;
            const int parity = state / kHalf;  // of the level that led here
            levels[r] = static_cast<std::int8_t>(level_[r][2 * odd + parity]);
            state = 2 * ((state ^ (parity ? kG0 : 0) ^ (odd ? kG1 : 0)) % kHalf) + parity;
        }
    }

  private:
    static constexpr int kHalf = kStates / 2, kG0 = kH0 >> 1, kG1 = kH1 >> 1;
    // So the upper half of the states is reached from odd states alone, and the lower half from even ones.
    static_assert(kHalf <= kG0 && kG0 < kStates && kG1 < kHalf);
    static constexpr float kUnreachable = 1e30f;

    static constexpr int kLanes = std::min(kHalf, 4), kBlocks = kHalf / kLanes;
    using Lanes = std::conditional_t<kLanes == 4, Float4, Float2>;
    using Mask = std::conditional_t<kLanes == 4, Int4, Int2>;
    using Costs = Lanes[2 * kBlocks];  // state s in block s / kLanes
    static constexpr std::make_integer_sequence<int, kLanes> kEach{};

    // Which states were reached by an odd k: bit `block` of lane `lane`.
    struct Odd {
        Mask word[(2 * kBlocks + 31) / 32];
    };

    static float at(const Costs& cost, int state) { return cost[state / kLanes][state % kLanes]; }

    // Every second lane of a and b, from lane `first`.
    template <int first, int... lane>
    static Lanes every_second(Lanes a, Lanes b, std::integer_sequence<int, lane...>) {
        return Lanes{(2 * lane < kLanes ? a : b)[(2 * lane + first) % kLanes]...};
    }

    template <int flip, int... lane>
    static Lanes swap_lanes(Lanes a, std::integer_sequence<int, lane...>) {
        return Lanes{a[lane ^ flip]...};
    }

    // Entries n ^ flip for the entries n of a block.
    template <int flip>
    static Lanes swapped(const Lanes* from, int block) {
        return swap_lanes<flip % kLanes>(from[block ^ flip / kLanes], kEach);
    }

    static Lanes better(Lanes even, Lanes odd, int block, Odd& chosen) {
        const Mask take = odd < even;
        chosen.word[block / 32] |= take & static_cast<std::int32_t>(1u << block % 32);
        return take ? odd : even;
    }

    // One row: the states' costs before it become those after it.
    static void advance(Costs& cost, Float4 levels, Odd& chosen) {
        Lanes from_even[kBlocks], from_odd[kBlocks];
        for (int i = 0; i < kBlocks; ++i) {
            from_even[i] = every_second<0>(cost[2 * i], cost[2 * i + 1], kEach);
            from_odd[i] = every_second<1>(cost[2 * i], cost[2 * i + 1], kEach);
        }
        constexpr int low = kG0 % kHalf;
        chosen = Odd{};
#pragma GCC unroll 64
        for (int i = 0; i < kBlocks; ++i) {
            cost[i] = better(from_even[i] + levels[0], swapped<kG1>(from_even, i) + levels[2], i, chosen);
            cost[kBlocks + i] = better(swapped<low>(from_odd, i) + levels[1],
                                       swapped<low ^ kG1>(from_odd, i) + levels[3], kBlocks + i, chosen);
        }
    }

    std::vector<Float4> level_;
    std::vector<Odd> odd_;
};

}  // namespace pgolf::trellis
