// Streams that the encoder wrote, and what becomes of them: inputs for decode.cpp, the same ones for the same seed.
#pragma once

namespace pgolf::codec {
namespace {

class Mutator {
  public:
    explicit Mutator(std::uint64_t seed) : random_(seed) {
        const std::vector<Shape> tall = {{40, 12}, {40, 12}, {40, 12}, {9, 30}}, wide = {{12, 40}, {12, 40}};
        for (std::size_t kind = 0; kind < kTrellises.size(); ++kind)
            for (const int scale : {1, 5, 60}) {
                add(tall, kTrellises[kind], scale);
                add(wide, kTrellises[kind], scale);
            }
        add({{64, 64}}, kTrellises[0], 5);
        add({{0, 7}, {7, 0}, {1, 1}, {1, 50}, {50, 1}}, kTrellises[0], 300);
        add({{40, 30}, {40, 30}}, kTrellises[0], 0);
        add_alike();
        add_bytes({});
        add_bytes(noise(300));
        add_bytes(Bytes(2000, 7));
        const std::string text = "static int value = 1; static int other = 2; // static text ";
        Bytes repeated;
        for (int i = 0; i < 20; ++i) repeated.insert(repeated.end(), text.begin(), text.end());
        add_bytes(repeated);
        quick_ = corpus_.size();
        add_wide();
    }

    const std::vector<Input>& corpus() const { return corpus_; }

    Input next() {
        Input input = corpus_[below(500) ? below(quick_) : quick_ + below(corpus_.size() - quick_)];
        for (std::size_t left = 1 + below(3); left > 0; --left) {
            const std::size_t kind = below(16);
            if (kind < 10)
                edit_stream(input, kind);
            else if (!input.group)
                edit_size(input);
            else if (kind < 12)
                edit_shapes(input.shapes);
            else if (kind < 14)
                edit_length(input);
            else
                edit_header(input);
        }
        if (below(4)) mend_lengths(input);
        return input;
    }

  private:
    std::size_t below(std::size_t limit) { return limit ? random_() % limit : 0; }

    Bytes noise(std::size_t size) {
        Bytes data(size);
        for (auto& value : data) value = static_cast<std::uint8_t>(random_());
        return data;
    }

    // Near-Gaussian, of about the given standard deviation; the largest scales fill int8 and are clipped.
    int draw(int scale) {
        int sum = 0;
        for (int i = 0; i < 12; ++i) sum += static_cast<int>(below(257)) - 128;
        return std::clamp(sum * scale / 256, -126, 126);
    }

    Int8Array matrix(Shape shape, const Trellis& trellis, int scale) {
        Int8Array result({static_cast<py::ssize_t>(shape.rows), static_cast<py::ssize_t>(shape.columns)});
        std::vector<std::uint8_t> states(shape.columns);
        for (std::size_t i = 0; i < shape.count(); ++i) {
            std::uint8_t& state = states[i % shape.columns];
            const int k = trellis.index(state, draw(scale));
            result.mutable_data()[i] = static_cast<std::int8_t>(trellis.entry(state, k));
            state = trellis.next(state, k);
        }
        return result;
    }

    void add(const std::vector<Shape>& shapes, const Trellis& trellis, int scale) {
        std::vector<Int8Array> matrices;
        for (const Shape shape : shapes) matrices.push_back(matrix(shape, trellis, scale));
        add(matrices);
    }

    void add(const std::vector<Int8Array>& matrices) {
        Input input;
        input.group = true;
        for (const auto& matrix : matrices)
            input.shapes.push_back(
                {static_cast<std::uint16_t>(matrix.shape(0)), static_cast<std::uint16_t>(matrix.shape(1))});
        const auto coded = encode_groups({matrices}, 1);
        const auto bytes = view(coded[0].first);
        input.coded.assign(bytes.begin(), bytes.end());
        expect_equal(matrices, decode(input, 1, 0x55).matrices, "matrices do not survive coding");
        corpus_.push_back(std::move(input));
    }

    // Rows that come again with small changes, so that streams refer to earlier rows.
    void add_alike() {
        Int8Array result = matrix({60, 60}, kTrellises[0], 30);
        std::int8_t* data = result.mutable_data();
        for (std::size_t i = 20 * 60; i < 60 * 60; ++i)
            data[i] = static_cast<std::int8_t>(data[i - 20 * 60] + static_cast<int>(below(3)) - 1);
        add({result});
    }

    // Zeros, and the same bytes with noise behind them as the beginning of a larger matrix, whose rows are too wide for
    // Similar to remember. (Coding all of it would take seconds.)
    void add_wide() {
        add({matrix({300, 520}, kTrellises[0], 0)});  // more columns than Linear has taps
        Input input = corpus_.back();
        input.shapes = {{1040, 2056}};
        const Bytes tail = noise(300);
        input.coded.insert(input.coded.end(), tail.begin(), tail.end());
        mend_lengths(input);
        corpus_.push_back(std::move(input));
    }

    void add_bytes(const Bytes& data) {
        Input input;
        input.size = static_cast<std::uint16_t>(data.size());
        const py::bytes coded = encode_data(as_bytes(data));
        const auto bytes = view(coded);
        input.coded.assign(bytes.begin(), bytes.end());
        const py::bytes decoded = decode_data(coded, data.size());
        if (!std::ranges::equal(view(decoded), data)) fail("bytes do not survive coding");
        corpus_.push_back(std::move(input));
    }

    // Mostly without the table of lengths, where there is one: a damaged table ends every further look.
    void edit_stream(Input& input, std::size_t kind) {
        const std::size_t table = input.group && below(8) ? std::min(4 * streams(input), input.coded.size()) : 0;
        const auto start = input.coded.begin() + static_cast<std::ptrdiff_t>(table);
        Bytes data(start, input.coded.end());
        if (kind < 4)
            flip(data);
        else if (kind < 8)
            edit_block(data);
        else if (kind == 8)
            splice(data, corpus_[below(corpus_.size())].coded);
        else
            data = noise(below(2) ? data.size() : below(400));
        input.coded.erase(start, input.coded.end());
        input.coded.insert(input.coded.end(), data.begin(), data.end());
    }

    void flip(Bytes& data) {
        if (!data.empty()) data[below(data.size())] ^= static_cast<std::uint8_t>(1 << below(8));
    }

    // Cuts the end off, or takes out, repeats, overwrites or puts in a block.
    void edit_block(Bytes& data) {
        const std::size_t start = below(data.size() + 1), size = std::min(1 + below(24), data.size() - start);
        const auto first = data.begin() + static_cast<std::ptrdiff_t>(start);
        const auto last = first + static_cast<std::ptrdiff_t>(size);
        switch (below(6)) {
            case 0:
                data.resize(start);
                break;
            case 1:
                data.erase(first, last);
                break;
            case 2: {
                const Bytes block(first, last);
                data.insert(data.begin() + static_cast<std::ptrdiff_t>(below(data.size() + 1)), block.begin(),
                            block.end());
                break;
            }
            case 3:
                std::fill(first, last, below(2) ? 0 : 255);
                break;
            case 4: {
                const Bytes block = noise(size);
                std::copy(block.begin(), block.end(), first);
                break;
            }
            default: {
                const Bytes block = noise(1 + below(24));
                data.insert(first, block.begin(), block.end());
            }
        }
    }

    // The beginning of one stream, the end of another.
    void splice(Bytes& data, const Bytes& other) {
        data.resize(below(data.size() + 1));
        data.insert(data.end(), other.begin() + static_cast<std::ptrdiff_t>(below(other.size() + 1)), other.end());
    }

    void edit_size(Input& input) {
        switch (below(4)) {
            case 0:
                ++input.size;
                break;
            case 1:
                --input.size;
                break;
            case 2:
                input.size = static_cast<std::uint16_t>(random_());
                break;
            default:
                input.shift = static_cast<std::uint8_t>(random_());
        }
    }

    void edit_shapes(std::vector<std::array<std::uint16_t, 2>>& shapes) {
        const std::size_t at = below(shapes.size());
        if (shapes.empty() || (shapes.size() < kMostMatrices && below(6) == 0)) {
            const auto copy = shapes.empty() ? std::array<std::uint16_t, 2>{3, 3} : shapes[at];
            shapes.insert(shapes.begin() + static_cast<std::ptrdiff_t>(at), copy);
            return;
        }
        auto& shape = shapes[at];
        auto& side = shape[below(2)];
        switch (below(7)) {
            case 0:
                shapes.erase(shapes.begin() + static_cast<std::ptrdiff_t>(at));
                break;
            case 1:
                ++side;
                break;
            case 2:
                --side;
                break;  // of none: a length beyond every limit
            case 3:
                std::swap(shape[0], shape[1]);
                break;
            case 4:
                side = static_cast<std::uint16_t>(2 * side);
                break;
            case 5:
                side = static_cast<std::uint16_t>(below(80));
                break;
            default:
                side = static_cast<std::uint16_t>(0xf000 + below(64));
        }
    }

    // A field of the group's table of lengths: a little off, moved to its neighbour, or anything.
    void edit_length(Input& input) {
        const std::size_t fields = streams(input);
        if (fields == 0 || input.coded.size() < 4 * fields) return;
        const std::size_t at = below(fields);
        const auto moved = static_cast<std::uint32_t>(below(9)) - 4;
        switch (below(4)) {
            case 0:
                put_length(input, at, get_length(input, at) + moved);
                break;
            case 1: {
                const std::size_t other = (at + 1) % fields;
                put_length(input, at, get_length(input, at) + moved);
                put_length(input, other, get_length(input, other) - moved);
                break;
            }
            case 2:
                put_length(input, at, static_cast<std::uint32_t>(random_()));
                break;
            default: {
                constexpr std::uint32_t ends[] = {0, 1, 0x7fffffff, 0x80000000, 0xffffffff};
                put_length(input, at, ends[below(std::size(ends))]);
            }
        }
    }

    // Makes the streams end where the group does, so that one of another size is looked at.
    void mend_lengths(Input& input) {
        const std::size_t fields = streams(input);
        if (fields == 0 || input.coded.size() < 4 * fields) return;
        auto rest = static_cast<std::uint32_t>(input.coded.size() - 4 * fields);
        for (std::size_t i = 0; i + 1 < fields; ++i) {
            put_length(input, i, std::min(get_length(input, i), rest));
            rest -= get_length(input, i);
        }
        put_length(input, fields - 1, rest);
    }

    // The orientation and trellis that a stream begins with: its first four bits, of which ones take the lower half.
    void edit_header(Input& input) {
        const std::size_t fields = streams(input);
        if (input.coded.size() < 4 * fields) return;
        std::size_t at = 4 * fields;
        for (std::size_t i = 0, before = below(fields); i < before; ++i) at += get_length(input, i);
        if (at < input.coded.size())
            input.coded[at] = static_cast<std::uint8_t>((input.coded[at] & 15) | (random_() << 4));
    }

    static std::uint32_t get_length(const Input& input, std::size_t field) {
        std::uint32_t value = 0;
        for (std::size_t i = 4; i > 0; --i) value = value << 8 | input.coded[4 * field + i - 1];
        return value;
    }

    static void put_length(Input& input, std::size_t field, std::uint32_t value) {
        for (std::size_t i = 0; i < 4; ++i) input.coded[4 * field + i] = static_cast<std::uint8_t>(value >> 8 * i);
    }

    static std::size_t streams(const Input& input) {
        std::vector<Shape> shapes;
        for (const auto& [rows, columns] : input.shapes) shapes.push_back({length(rows), length(columns)});
        return plan_streams(shapes).size();
    }

    std::mt19937_64 random_;
    std::vector<Input> corpus_;
    std::size_t quick_ = 0;  // so many at the front of the corpus take milliseconds
};

}  // namespace
}  // namespace pgolf::codec
