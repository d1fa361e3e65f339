// Linear prediction of a row's entries from one another, learned on the way, in integers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pgolf::codec {

// One weight vector a column, over the (at most kTaps) entries before it in the row, moved by LMS after each entry.
// Entries and errors come scaled: kUnit is a typical entry of the column. Weights are in 1/32768.
class Linear {
  public:
    static constexpr int kTaps = 512;
    static constexpr int kUnit = 16;
    static constexpr int kLimit = 127;  // of an entry and an error: kTaps * kLimit * 32768 < 2^31, no sum overflows

    explicit Linear(std::size_t columns)
        : taps_(std::min<std::size_t>(columns, kTaps)), weights_(columns * taps_), row_(columns) {}

    void begin_row() { rows_ += rows_ < kSlowest; }

    void set(std::size_t column, int entry) {
        row_[column] = static_cast<std::int16_t>(std::clamp(entry, -kLimit, kLimit));
    }

    // The prediction, in 1/32768 of 1/kUnit of a typical entry.
    std::int32_t predict(std::size_t column) const {
        const std::size_t taps = std::min(column, taps_);
        const std::int16_t *weights = &weights_[column * taps_], *entries = &row_[column - taps];
        std::int32_t sum = 0;
        for (std::size_t i = 0; i < taps; ++i) sum += weights[i] * entries[i];
        return sum;
    }

    // Columns are nearly uncorrelated, so LMS with a step of 1 / (rows + prior) comes close to least squares with that
    // many rows' worth of belief in zero: w += error * entry / (kUnit^2 * (rows + prior)).
    void update(std::size_t column, int entry, int error) {
        const std::size_t taps = std::min(column, taps_);
        std::int16_t* weights = &weights_[column * taps_];
        const std::int16_t* entries = &row_[column - taps];
        constexpr int one = 32768 / (kUnit * kUnit) * 65536;
        const int step =
            std::clamp(error, -kLimit, kLimit) * (one / (kPrior + rows_)) / 16;  // in 1/4096 of a weight's unit
        for (std::size_t i = 0; i < taps; ++i)
            weights[i] = static_cast<std::int16_t>(weights[i] + ((step * entries[i] + 2048) >> 12));
        set(column, entry);
    }

  private:
    static constexpr int kPrior = 4096, kSlowest = 28672;

    std::size_t taps_;
    std::vector<std::int16_t> weights_, row_;
    int rows_ = 0;
};

}  // namespace pgolf::codec
