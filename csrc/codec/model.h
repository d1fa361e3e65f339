// The parts every model is made of: adaptive counters and a logistic mixer of their opinions, in integers.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "coder.h"

namespace pgolf::codec {

// Log odds ln(p / (1 - p)) are kept in 1/256, clipped to [-2047, 2047].
constexpr int kMaxOdds = 2047;

// squash: log odds -> probability of a one in 1/65536. stretch: its inverse, indexed by probability >> 4.
struct Tables {
    std::array<std::uint16_t, 2 * kMaxOdds + 1> squash;
    std::array<std::int16_t, 4096> stretch;
    std::array<std::uint16_t, 1024> rate;  // 65536 / (n + 1.5): a counter's step after n updates

    constexpr Tables() : squash{}, stretch{}, rate{} {
        // 65536 / (1 + exp(-x)) at x = 0, 1/2, ..., 8, and a parabola through each three neighbours: constants, so that
        // no machine's exp() enters the format.
        constexpr int knots[] = {32768, 40793, 47911, 53581, 57724, 60565, 62428, 63615, 64357,
                                 64816, 65097, 65269, 65374, 65438, 65476, 65500, 65514};
        auto knot = [&](int i) { return i >= 0 ? knots[i < 16 ? i : 16] : 65536 - knots[-i < 16 ? -i : 16]; };
        for (int odds = -kMaxOdds; odds <= kMaxOdds; ++odds) {
            const int i = (odds + 2048) / 128 - 16, t = (odds + 2048) % 128;  // t / 128 between knots i and i + 1
            const int a = knot(i), b = knot(i + 1), bend = (knot(i + 2) - b) - (a - knot(i - 1));
            const int p = a + ((b - a) * t) / 128 - (bend * t * (128 - t)) / (4 * 128 * 128);
            squash[odds + kMaxOdds] =
                static_cast<std::uint16_t>(std::clamp(p, kMinProbability, 65536 - kMinProbability));
        }
        int odds = -kMaxOdds;
        for (int i = 0; i < 4096; ++i) {
            while (odds < kMaxOdds && squash[odds + kMaxOdds] < 16 * i + 8) ++odds;
            stretch[i] = static_cast<std::int16_t>(odds);
        }
        for (int n = 0; n < 1024; ++n) rate[n] = static_cast<std::uint16_t>(65536 * 2 / (2 * n + 3));
    }
};

inline constexpr Tables kTables{};

// Probability of a one in 22 bits and the number of updates in 10. The step is 1/(n + 1.5) until n reaches a limit: an
// average over everything seen, then over a window.
class Counter {
  public:
    int probability() const { return static_cast<int>(state_ >> 16); }

    bool seen() const { return (state_ & 1023) != 0; }

    void update(int bit, std::uint32_t limit) {
        const std::uint32_t n = state_ & 1023;
        const std::int64_t p = state_ >> 10, target = bit ? (1 << 22) - 1 : 0;
        const auto moved = static_cast<std::uint32_t>(p + (((target - p) * kTables.rate[n]) >> 16));
        state_ = (moved << 10) | (n < limit ? n + 1 : n);
    }

  private:
    std::uint32_t state_ = 1u << 31;
};

// Codes a decision with the weighted sum of N counters' log odds; weights (in 1/65536) learn by gradient descent on the
// code length, one set of weights for each `set`.
template <int N>
class Mixer {
  public:
    Mixer(std::size_t sets, int rate) : weights_(sets * N, 65536 * 5 / (4 * N)), rate_(rate) {}

    template <class Coder>
    int code(Coder& coder, std::size_t set, const std::array<Counter*, N>& counters, std::uint32_t limit, int bit) {
        std::int32_t* weights = &weights_[set * N];
        std::array<int, N> odds;
        std::int64_t sum = 0;
        for (int i = 0; i < N; ++i) {
            odds[i] = kTables.stretch[counters[i]->probability() >> 4];
            sum += static_cast<std::int64_t>(weights[i]) * odds[i];
        }
        const auto mixed = static_cast<int>(std::clamp<std::int64_t>(sum >> 16, -kMaxOdds, kMaxOdds));
        const int p = kTables.squash[mixed + kMaxOdds];
        bit = coder.bit(p, bit);
        const int error = (bit << 16) - p;
        for (int i = 0; i < N; ++i) {
            const std::int64_t step = (static_cast<std::int64_t>(odds[i]) * error * rate_ + (1 << 19)) >> 20;
            weights[i] = static_cast<std::int32_t>(std::clamp<std::int64_t>(weights[i] + step, -(1 << 20), 1 << 20));
            counters[i]->update(bit, limit);
        }
        return bit;
    }

  private:
    std::vector<std::int32_t> weights_;
    int rate_;
};

// A decision coded by one counter alone.
template <class Coder>
int code_plain(Coder& coder, Counter& counter, int bit) {
    bit = coder.bit(std::clamp(counter.probability(), kMinProbability, 65536 - kMinProbability), bit);
    counter.update(bit, 255);
    return bit;
}

// Level of a non-negative number on a scale of four steps an octave.
inline int level(std::uint32_t value) {
    if (value < 4) return static_cast<int>(value);
    int exponent = 0;
    while ((value >> exponent) >= 8) ++exponent;
    return 4 * exponent + static_cast<int>(value >> exponent);
}

}  // namespace pgolf::codec
