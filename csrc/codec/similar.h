// Rows that resemble an earlier row: like tokens have like embeddings.
#pragma once

#include <bit>
#include <span>

#include "model.h"

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define PGOLF_WIDE __attribute__((target_clones("avx2", "default")))
#else
#define PGOLF_WIDE
#endif

namespace pgolf::codec {

// Remembers what linear prediction left of every row, and predicts a row's residuals by those of one earlier row times
// a factor. The encoder finds the row and sends its number where that saves more than it costs. (A second row is not
// worth its search: 0.1 % of an embedding.)
class Similar {
  public:
    struct Choice {
        std::size_t row;
        int factor;  // in 1/kFactors; 0: no row is like this one
    };

    explicit Similar(std::size_t columns) : columns_(columns) {}

    // Codes the choice for the next row; `residuals` gives an encoder that row's residuals.
    template <class Coder, class Residuals>
    Choice code(Coder& coder, Residuals residuals) {
        if (columns_ > kWidest || rows() == 0) return {0, 0};
        Choice choice{0, 0};
        if constexpr (!Coder::decoding)
            // A search costs more than coding the row: while nothing is alike, only one row in 16 is searched for.
            if (hope_ > 0 || rows() % 16 == 0) choice = find(residuals());
        if (!code_plain(coder, used_, choice.factor != 0)) {
            hope_ -= hope_ > 0;
            return {0, 0};
        }
        hope_ = 16;
        int factor = 0;
        for (int i = 4; i >= 0; --i) factor = 2 * factor + coder.bit(32768, ((choice.factor + kFactors) >> i) & 1);
        std::size_t row = 0;
        for (int i = index_bits() - 1; i >= 0; --i) row = 2 * row + coder.bit(32768, (choice.row >> i) & 1);
        if (row >= rows()) throw StreamError("coded stream refers to a row that is still to come");
        return {row, factor - kFactors};
    }

    // Room for the next row's residuals (empty where rows are too wide to be remembered).
    std::span<std::int8_t> begin_row() {
        if (columns_ > kWidest) return {};
        residuals_.resize(residuals_.size() + columns_);
        return {residuals_.end() - static_cast<std::ptrdiff_t>(columns_), residuals_.end()};
    }

    // In 1/32768 of a residual's unit, as Linear.
    std::int32_t predict(Choice choice, std::size_t column) const {
        return choice.factor ? choice.factor * residuals_[choice.row * columns_ + column] * (32768 / kFactors) : 0;
    }

  private:
    static constexpr int kFactors = 16;
    static constexpr std::size_t kWidest = 2048;  // columns; the products in `find` then fit 64 bits

    std::size_t rows() const { return residuals_.size() / columns_; }
    int index_bits() const { return std::bit_width(rows() - 1); }

    // Most of an encoder's time: compiled for wider vectors too where the compiler chooses among versions at run time.
    PGOLF_WIDE static std::int32_t dot(const std::int8_t* a, const std::int8_t* b, std::size_t size) {
        std::int32_t sum = 0;
        for (std::size_t i = 0; i < size; ++i) sum += a[i] * b[i];
        return sum;
    }

    // The row that explains the largest share of `wanted`. With cosine c it saves about 0.72 c^2 bits an entry.
    Choice find(const std::vector<std::int8_t>& wanted) const {
        std::int64_t best_product = 0, best_norm = 1;
        Choice best{0, 0};
        for (std::size_t i = 0; i < rows(); ++i) {
            const std::int64_t product = dot(&residuals_[i * columns_], wanted.data(), columns_);
            // product^2 / norm is compared only for products that could win at the best row's norm / 2.
            if (2 * product * product <= best_product * best_product) continue;
            const std::int64_t norm = dot(&residuals_[i * columns_], &residuals_[i * columns_], columns_);
            if (norm > 0 && product * product / norm > best_product * best_product / best_norm) {
                best_product = product, best_norm = norm;
                best.row = i;
            }
        }
        const std::int64_t norm = dot(wanted.data(), wanted.data(), columns_);
        const std::int64_t explained = best_product * best_product / best_norm;  // of norm
        if (explained * static_cast<std::int64_t>(columns_) * 72 <= norm * 100 * (index_bits() + 7)) return {0, 0};
        const std::int64_t factor =
            (2 * best_product * kFactors + (best_product > 0 ? best_norm : -best_norm)) / (2 * best_norm);
        best.factor = static_cast<int>(std::clamp<std::int64_t>(factor, -kFactors, kFactors - 1));
        return best;
    }

    std::size_t columns_;
    std::vector<std::int8_t> residuals_;
    Counter used_;
    int hope_ = 16;
};

}  // namespace pgolf::codec
