// Binary arithmetic coder: 32-bit interval, 16-bit probabilities, no carries, integers only.
//
// Encoder and Decoder have the same members, `bit`, `finish` and `position` (in bytes), so that a model is written
// once, as a template over the coder, and both directions cannot drift apart.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace pgolf::codec {

struct StreamError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A probability stays this far from 0 and 65536. It makes every decision cost at least 0.0007 bits, which bounds how
// many symbols a stream of given length can hold (see `max_symbols`): a short hostile stream cannot ask for much
// memory.
constexpr int kMinProbability = 32;

// Where [low, high] is cut for P(bit = 1) = p / 65536: ones take the lower part.
inline std::uint32_t cut(std::uint32_t low, std::uint32_t high, int p) {
    return low +
           static_cast<std::uint32_t>((static_cast<std::uint64_t>(high - low) * static_cast<std::uint32_t>(p)) >> 16);
}

class Encoder {
  public:
    static constexpr bool decoding = false;

    int bit(int p, int value) {
        const std::uint32_t middle = cut(low_, high_, p);
        (value ? high_ : low_) = value ? middle : middle + 1;
        while (((low_ ^ high_) >> 24) == 0) {
            out_.push_back(static_cast<std::uint8_t>(high_ >> 24));
            low_ <<= 8;
            high_ = (high_ << 8) | 255;
        }
        return value;
    }

    // Enough bytes that the decoder's window of four never reaches past the end.
    void finish() {
        for (int shift = 24; shift >= 0; shift -= 8) out_.push_back(static_cast<std::uint8_t>(low_ >> shift));
    }

    std::size_t position() const { return out_.size(); }

    std::vector<std::uint8_t> take() { return std::move(out_); }

  private:
    std::uint32_t low_ = 0, high_ = 0xffffffff;
    std::vector<std::uint8_t> out_;
};

class Decoder {
  public:
    static constexpr bool decoding = true;

    Decoder(const std::uint8_t* data, std::size_t size) : begin_(data), next_(data), end_(data + size) {
        for (int i = 0; i < 4; ++i) code_ = (code_ << 8) | byte();
    }

    int bit(int p, int /*value*/) {
        const std::uint32_t middle = cut(low_, high_, p);
        const int value = code_ <= middle;
        (value ? high_ : low_) = value ? middle : middle + 1;
        while (((low_ ^ high_) >> 24) == 0) {
            low_ <<= 8;
            high_ = (high_ << 8) | 255;
            code_ = (code_ << 8) | byte();
        }
        return value;
    }

    void finish() {
        if (next_ != end_) throw StreamError("coded stream is longer than its symbols");
        if (code_ != low_) throw StreamError("coded stream does not end where its encoder ended");
    }

    // Where the encoder was after the same decisions: four bytes, read ahead, are still in the window.
    std::size_t position() const { return static_cast<std::size_t>(next_ - begin_) - 4; }

  private:
    std::uint32_t byte() {
        if (next_ == end_) throw StreamError("coded stream ends before its last symbol");
        return *next_++;
    }

    std::uint32_t low_ = 0, high_ = 0xffffffff, code_ = 0;
    const std::uint8_t *begin_, *next_, *end_;
};

}  // namespace pgolf::codec
