#include "matrix.h"

#include <cstdlib>

#include "linear.h"
#include "similar.h"
#include "trellis.h"

namespace pgolf::codec {
namespace {

// An entry is predicted from the earlier entries of its row (the columns of a trained matrix are correlated, the
// embedding's most), and coded relative to that: above or below, then the distance in unary, counted in entries that
// the trellis allows. Each of these decisions mixes counters that know how large entries are in this column, in this
// row and right here; parity enters only through the place of the prediction, since it hardly changes the
// distribution's shape.
class RowModel {
  public:
    // States run down the columns, or along the rows of a transposed matrix.
    RowModel(std::size_t columns, const Trellis& trellis, bool transpose)
        : trellis_(trellis),
          state_stride_(transpose ? 0 : 1),
          states_(transpose ? 1 : columns),
          linear_(columns),
          similar_(columns),
          unit_(columns, kTypical),
          column_size_(columns, kTypical),
          by_column_(columns * kNodes) {}

    // The states that a matrix, or a transposed matrix's row, starts in.
    void restart() { std::fill(states_.begin(), states_.end(), 0); }

    // Codes a row; a decoder fills it.
    template <class Coder>
    void row(Coder& coder, std::span<std::int8_t> row) {
        linear_.begin_row();
        const Similar::Choice like = similar_.code(coder, [&] { return residuals(row); });
        linear_.clear();
        const std::span<std::int8_t> residuals = similar_.begin_row();
        std::int32_t row_size = kTypical;
        for (std::size_t j = 0; j < row.size(); ++j) {
            std::int32_t &unit = unit_[j], &column_size = column_size_[j];
            const std::int32_t linear = prediction(j);
            const std::int32_t mean = clamped(linear + unscaled(similar_.predict(like, j), unit));
            std::uint8_t& state = states_[j * state_stride_];
            const int k = symbol(coder, {j, mean, column_size, row_size, state}, trellis_.index(state, row[j]));
            const int value = trellis_.entry(state, k);
            if (value < -128 || value > 127) throw StreamError("coded stream holds an entry that is no int8");
            row[j] = static_cast<std::int8_t>(value);
            state = trellis_.next(state, k);

            const std::int32_t entry = value * kOne;
            const int residual = scaled(entry - linear, unit);
            linear_.update(j, scaled(entry, unit), residual);
            if (!residuals.empty()) residuals[j] = static_cast<std::int8_t>(residual);
            // Running means of |error|: of the column over 128 rows, of the row over 100 entries, of the last 8.
            const std::int32_t size = std::abs(entry - mean), window = std::min(rows_ + 2, 128);
            unit += (std::abs(entry - linear) - unit) / window;
            column_size += (size - column_size) / window;
            row_size += (size - row_size) / static_cast<std::int32_t>(std::min<std::size_t>(j + 8, 100));
            near_size_ += (size - near_size_) / 8;
        }
        ++rows_;
    }

  private:
    static constexpr int kOne = 256;  // predictions and sizes are in 1/256
    static constexpr int kTypical = 4 * kOne;
    static constexpr int kUnary = 24;  // distances from here on are Exp-Golomb
    static constexpr int kNodes = 1 + 2 * kUnary;
    static constexpr int kFractions = 4;  // a prediction's place between two allowed entries
    static constexpr int kLevels = 64;
    static constexpr int kPlaces = 32;  // integers around zero that a prediction may fall on
    static constexpr int kInputs = 5;
    static constexpr int kWindow = 1000;  // of a counter, in updates

    struct Where {
        std::size_t column;
        std::int32_t mean, column_size, row_size;
        std::uint8_t state;
    };

    static int scaled(std::int32_t value, std::int32_t size) {
        const std::int64_t units = Linear::kUnit * 65536 / std::max(size, 32);
        return static_cast<int>(
            std::clamp<std::int64_t>((value * units + 32768) >> 16, -Linear::kLimit, Linear::kLimit));
    }

    static std::int32_t unscaled(std::int64_t sum, std::int32_t size) {
        return static_cast<std::int32_t>(sum * size / (Linear::kUnit * 32768));
    }

    static std::int32_t clamped(std::int32_t mean) { return std::clamp(mean, -128 * kOne, 127 * kOne); }

    std::int32_t prediction(std::size_t column) const {
        return clamped(unscaled(linear_.predict(column), unit_[column]));
    }

    // What linear prediction will leave of a row that is known already (to an encoder).
    std::vector<std::int8_t> residuals(std::span<const std::int8_t> row) {
        std::vector<std::int8_t> result(row.size());
        linear_.clear();
        for (std::size_t j = 0; j < row.size(); ++j) {
            const std::int32_t entry = row[j] * kOne, mean = prediction(j);
            linear_.set(j, scaled(entry, unit_[j]));
            result[j] = static_cast<std::int8_t>(scaled(entry - mean, unit_[j]));
        }
        return result;
    }

    // Codes an entry as its index k among those that the state allows.
    template <class Coder>
    int symbol(Coder& coder, const Where& at, int k) {
        const std::int32_t mean = trellis_.index(at.state, at.mean, kOne);
        const std::int32_t split = mean - kOne / 2;  // "above" starts at the allowed entry nearest to the prediction
        const int floor = split >> 8, fraction = (split & 255) * kFractions / kOne;
        const auto counters = [&](std::vector<Counter>& table, int context) {
            return &table[static_cast<std::size_t>(context * kFractions + fraction) * kNodes];
        };
        const std::array<Counter*, kInputs> contexts = {
            counters(by_column_size_, std::min(level(at.column_size / 8), kLevels - 1)),
            counters(by_row_size_, std::min(level(at.row_size / 8), kLevels - 1)),
            counters(by_near_size_, std::min(level(near_size_ / 16), kLevels - 1)),
            counters(by_place_, std::clamp(trellis_.entry(at.state, floor) + kPlaces / 2, 0, kPlaces - 1)),
            &by_column_[at.column * kNodes],
        };
        const auto decide = [&](int node, bool bit) {
            std::array<Counter*, kInputs> inputs;
            for (int i = 0; i < kInputs; ++i) inputs[i] = contexts[i] + node;
            return mixer_.code(coder, node, inputs, kWindow, bit);
        };
        const bool above = decide(0, k > floor);
        const int wanted = above ? k - floor - 1 : floor - k;  // of no use to a decoder
        int distance = 0;
        while (distance < kUnary && decide((above ? 1 : 1 + kUnary) + distance, wanted > distance)) ++distance;
        if (distance == kUnary) distance += rest(coder, wanted - kUnary);
        return above ? floor + 1 + distance : floor - distance;
    }

    // Exp-Golomb: the bit length of rest + 1 in unary, then the bits below its leading one.
    template <class Coder>
    int rest(Coder& coder, int rest) {
        int bits = 0, value = 1;
        while (bits < 8 && code_plain(coder, length_[bits], ((rest + 1) >> (bits + 1)) != 0)) ++bits;
        for (int i = bits - 1; i >= 0; --i) value = 2 * value + code_plain(coder, digit_[bits], ((rest + 1) >> i) & 1);
        return value - 1;
    }

    Trellis trellis_;
    std::size_t state_stride_;
    std::vector<std::uint8_t> states_;
    Linear linear_;
    Similar similar_;
    std::int32_t rows_ = 0, near_size_ = kTypical;
    std::vector<std::int32_t> unit_;         // what Linear takes for kUnit: running mean of |entry - linear prediction|
    std::vector<std::int32_t> column_size_;  // of |entry - prediction|
    std::vector<Counter> by_column_;
    std::vector<Counter> by_column_size_{kLevels * kFractions * kNodes}, by_row_size_{kLevels * kFractions * kNodes};
    std::vector<Counter> by_near_size_{kLevels * kFractions * kNodes}, by_place_{kPlaces * kFractions * kNodes};
    std::array<Counter, 9> length_{}, digit_{};
    Mixer<kInputs> mixer_{kNodes, 3};
};

// Entries in a stream's middle that both directions are tried on: the other matrices are like them.
constexpr std::size_t kTried = std::size_t{1} << 19;

// Coding runs along the side whose entries predict each other: that of the residual stream, which is the shorter one,
// or either in attention, where both are tried. Never along a much longer one: the model's memory grows with the row.
bool may_run_along(std::size_t length, Shape shape) { return length <= 2 * std::min(shape.rows, shape.columns); }

std::vector<std::int8_t> transposed(const std::int8_t* from, Shape shape) {
    std::vector<std::int8_t> to(shape.count());
    for (std::size_t i = 0; i < shape.rows; ++i)
        for (std::size_t j = 0; j < shape.columns; ++j) to[j * shape.rows + i] = from[i * shape.columns + j];
    return to;
}

template <class Coder>
void code_rows(Coder& coder, RowModel& model, std::int8_t* matrix, Shape shape, bool transpose) {
    for (std::size_t i = 0; i < shape.rows; ++i) {
        if (transpose || i == 0) model.restart();
        model.row(coder, {matrix + i * shape.columns, shape.columns});
    }
}

bool obeys(std::span<const std::int8_t* const> matrices, Shape shape, const Trellis& trellis) {
    for (const std::int8_t* matrix : matrices) {
        std::vector<std::uint8_t> states(shape.columns);
        for (std::size_t i = 0; i < shape.count(); ++i) {
            std::uint8_t& state = states[i % shape.columns];
            if (!trellis.allows(state, matrix[i])) return false;
            state = trellis.next(state, trellis.index(state, matrix[i]));
        }
    }
    return true;
}

// The first trellis that all matrices obey, plain where there is none. What obeys several (zeros do) may have any.
std::size_t kind_of(std::span<const std::int8_t* const> matrices, Shape shape) {
    for (std::size_t kind = 1; kind < kTrellises.size(); ++kind)
        if (obeys(matrices, shape, kTrellises[kind])) return kind;
    return 0;
}

Stream encode_oriented(std::span<const std::int8_t* const> matrices, Shape shape, std::size_t kind, bool transpose) {
    const Shape coded = transpose ? Shape{shape.columns, shape.rows} : shape;
    RowModel model(coded.columns, kTrellises[kind], transpose);
    Encoder coder;
    Stream stream;
    coder.bit(32768, transpose);
    for (int i = kKindBits - 1; i >= 0; --i) coder.bit(32768, (kind >> i) & 1);
    for (const std::int8_t* matrix : matrices) {
        auto copy = transpose ? transposed(matrix, shape) : std::vector<std::int8_t>(matrix, matrix + shape.count());
        code_rows(coder, model, copy.data(), coded, transpose);
        stream.ends.push_back(coder.position());
    }
    coder.finish();
    stream.ends.back() = coder.position();
    stream.bytes = coder.take();
    return stream;
}

}  // namespace

std::vector<Range> plan_streams(std::span<const Shape> shapes) {
    std::vector<Range> streams;
    std::size_t entries = 0;
    for (std::size_t i = 0; i < shapes.size(); ++i) {
        const std::size_t count = shapes[i].count();
        if (i > 0 && shapes[i] == shapes[i - 1] && entries + count <= kStreamEntries) {
            streams.back().last = i + 1;
            entries += count;
        } else {
            streams.push_back({i, i + 1});
            entries = count;
        }
    }
    return streams;
}

Stream encode_stream(std::span<const std::int8_t* const> matrices, Shape shape) {
    if (shape.count() == 0) return {{}, std::vector<std::size_t>(matrices.size())};
    const std::size_t kind = kind_of(matrices, shape);
    const bool rows = may_run_along(shape.columns, shape), columns = may_run_along(shape.rows, shape);
    if (!rows || !columns) return encode_oriented(matrices, shape, kind, columns);
    const std::size_t count = std::min(matrices.size(), std::max<std::size_t>(1, kTried / shape.count()));
    const auto tried = matrices.subspan((matrices.size() - count) / 2, count);
    Stream plain = encode_oriented(tried, shape, kind, false), turned = encode_oriented(tried, shape, kind, true);
    const bool transpose = turned.bytes.size() < plain.bytes.size();
    if (tried.size() == matrices.size()) return transpose ? std::move(turned) : std::move(plain);
    return encode_oriented(matrices, shape, kind, transpose);
}

std::vector<std::size_t> decode_stream(std::span<const std::uint8_t> stream, std::span<std::int8_t* const> matrices,
                                       Shape shape) {
    std::vector<std::size_t> ends;
    if (shape.count() == 0) {
        if (!stream.empty()) throw StreamError("coded stream of empty matrices is not empty");
        ends.resize(matrices.size());
        return ends;
    }
    Decoder coder(stream.data(), stream.size());
    const bool transpose = coder.bit(32768, 0);
    if (!may_run_along(transpose ? shape.rows : shape.columns, shape))
        throw StreamError("coded stream runs along the longer side of its matrices");
    std::size_t kind = 0;
    for (int i = 0; i < kKindBits; ++i) kind = 2 * kind + coder.bit(32768, 0);
    if (kind >= kTrellises.size()) throw StreamError("coded stream names a trellis that does not exist");
    const Shape coded = transpose ? Shape{shape.columns, shape.rows} : shape;
    RowModel model(coded.columns, kTrellises[kind], transpose);
    for (std::int8_t* matrix : matrices) {
        code_rows(coder, model, matrix, coded, transpose);
        ends.push_back(coder.position());
        if (!transpose) continue;
        const auto turned = transposed(matrix, coded);
        std::copy(turned.begin(), turned.end(), matrix);
    }
    coder.finish();
    ends.back() = stream.size();
    return ends;
}

}  // namespace pgolf::codec
