#include "quantize.h"

#include <algorithm>
#include <numbers>
#include <vector>

#include "search.h"

namespace pgolf::trellis {
namespace {

// What a column's search minimizes: (x - t)^2 + rate * bits, where bits = t^2 / (2 variance ln 2) + constant is the
// length of t under a Gaussian. Completing the square leaves weight * (target - t)^2 with weight = 1 + rate / (2
// variance ln 2) and target = x / weight. An entry's variance is its row's times the column's mean of x^2 / row
// variance.
class Column {
  public:
    explicit Column(const Problem& p) : p_(p), step_(p.rows), target_(p.rows), weight_(p.rows) {}

    void prepare(std::size_t c) {
        const float* work = p_.work + c * p_.rows;
        std::fill_n(sums_, kSums, 0.0);
        std::size_t count = 0;
        for (std::size_t r = 0; r < p_.rows; ++r) {
            step_[r] = p_.row_step[r] * p_.column_factor[c];
            const float x = step_[r] > 0 ? work[r] / step_[r] : 0;
            target_[r] = x;
            if (p_.row_variance[r] > 0) {
                sums_[r % kSums] += static_cast<double>(x) * x / p_.row_variance[r];
                ++count;
            }
        }
        for (std::size_t half = kSums / 2; half > 0; half /= 2)
            for (std::size_t i = 0; i < half; ++i) sums_[i] += sums_[i + half];
        const auto share = count ? static_cast<float>(sums_[0] / static_cast<double>(count)) : 0.0f;
        const auto rate = static_cast<float>(p_.rate / (2 * std::numbers::ln2));
        // Not below the variance of a level's own cell, two steps wide: no model is surer than that.
        constexpr float least = 1.0f / 3.0f;
        for (std::size_t r = 0; r < p_.rows; ++r) {
            weight_[r] = 1.0f + rate / std::max(p_.row_variance[r] * share, least);
            target_[r] /= weight_[r];
        }
    }

    const float* step() const { return step_.data(); }
    const float* target() const { return target_.data(); }
    const float* weight() const { return weight_.data(); }

  private:
    // A column is summed in this order on every machine: rows modulo kSums, which on a GPU are its threads, then
    // halves.
    static constexpr std::size_t kSums = 512;

    const Problem& p_;
    std::vector<float> step_, target_, weight_;
    double sums_[kSums];
};

// work[j] -= sum over c of upper[c, j] * errors[c] for the columns j behind a block, in the order of c and so exactly
// as if each column had been repaid at once. Written out, and not given to a BLAS, because the order of the sums of a
// BLAS depends on the machine and its threads.
class Update {
  public:
    static constexpr std::size_t kRows = 8, kCols = 4;  // of a tile that stays in registers

    Update(const Problem& p)
        : p_(p), errors_((p.rows + kRows - 1) / kRows * kRows * p.block), factors_(p.block * kCols) {}

    void keep(std::size_t place, const float* error) {
        for (std::size_t r = 0; r < p_.rows; ++r)
            errors_[(r / kRows * p_.block + place) * kRows + r % kRows] = error[r];
    }

    void apply(std::size_t first, std::size_t last) {
        for (std::size_t j = last; j < p_.cols; j += kCols) {
            const std::size_t width = std::min(kCols, p_.cols - j);
            for (std::size_t c = first; c < last; ++c)
                for (std::size_t i = 0; i < kCols; ++i)
                    factors_[(c - first) * kCols + i] = i < width ? p_.upper[c * p_.cols + j + i] : 0;
            for (std::size_t r = 0; r < p_.rows; r += kRows) tile(j, width, r, last - first);
        }
    }

  private:
    void tile(std::size_t j, std::size_t width, std::size_t r, std::size_t depth) {
        const std::size_t height = std::min(kRows, p_.rows - r);
        alignas(16) float values[kCols][kRows] = {};
        for (std::size_t i = 0; i < width; ++i) std::copy_n(p_.work + (j + i) * p_.rows + r, height, values[i]);
        Float4 sum[kCols][2];
        for (std::size_t i = 0; i < kCols; ++i) sum[i][0] = load4(values[i]), sum[i][1] = load4(values[i] + 4);
        const float* error = &errors_[r * p_.block];
        const float* factor = factors_.data();
        for (std::size_t c = 0; c < depth; ++c, error += kRows, factor += kCols) {
            const Float4 low = load4(error), high = load4(error + 4);
            for (std::size_t i = 0; i < kCols; ++i) {
                sum[i][0] -= factor[i] * low;
                sum[i][1] -= factor[i] * high;
            }
        }
        for (std::size_t i = 0; i < width; ++i)
            for (std::size_t k = 0; k < height; ++k) p_.work[(j + i) * p_.rows + r + k] = sum[i][k / 4][k % 4];
    }

    const Problem& p_;
    std::vector<float> errors_;   // [rows / kRows, block, kRows]
    std::vector<float> factors_;  // [block, kCols]
};

template <class Search>
void run(const Problem& p, std::int8_t* levels) {
    Search search;
    Column column(p);
    Update update(p);
    std::vector<float> error(p.rows);
    for (std::size_t first = 0; first < p.cols; first += p.block) {
        const std::size_t last = std::min(first + p.block, p.cols);
        for (std::size_t c = first; c < last; ++c) {
            std::int8_t* chosen = levels + c * p.rows;
            column.prepare(c);
            search(column.target(), column.weight(), p.rows, chosen);
            const float pivot = p.upper[c * p.cols + c];
            for (std::size_t r = 0; r < p.rows; ++r)
                error[r] = (p.work[c * p.rows + r] - static_cast<float>(chosen[r]) * column.step()[r]) / pivot;
            for (std::size_t j = c + 1; j < last; ++j) {
                const float factor = p.upper[c * p.cols + j];
                float* later = p.work + j * p.rows;
                for (std::size_t r = 0; r < p.rows; ++r) later[r] -= factor * error[r];
            }
            update.keep(c - first, error.data());
        }
        update.apply(first, last);
    }
}

using Run = void (*)(const Problem&, std::int8_t*);

Run find(int states) {
    switch (states) {
        case 4:
            return run<Search<4, 05, 02>>;
        case 8:
            return run<Search<8, 013, 04>>;
        case 32:
            return run<Search<32, 045, 010>>;
        case 64:
            return run<Search<64, 0103, 024>>;
        case 256:
            return run<Search<256, 0515, 0362>>;
        default:
            return nullptr;
    }
}

}  // namespace

bool known(int states) { return find(states) != nullptr; }

void quantize(const Problem& problem, int states, std::int8_t* levels) { find(states)(problem, levels); }

}  // namespace pgolf::trellis
