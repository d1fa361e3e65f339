#include "bytes.h"

#include <bit>

namespace pgolf::codec {
namespace {

class ByteModel {
  public:
    // Tables have room for about eight slots a byte: enough for small data, and bounded for large.
    explicit ByteModel(std::size_t size) : bits_(std::clamp(static_cast<int>(std::bit_width(size)) + 3, 12, 20)) {
        for (auto& table : tables_) table.resize(std::size_t{1} << bits_);
    }

    template <class Coder>
    std::uint8_t byte(Coder& coder, std::uint8_t value) {
        std::array<std::uint32_t, kInputs> seeds;
        for (int i = 0; i < kInputs; ++i) {
            const std::uint64_t bytes = history_ & ((std::uint64_t{1} << (8 * kOrders[i])) - 1);
            seeds[i] = static_cast<std::uint32_t>(((bytes + 1) * 0x9e3779b97f4a7c15u) >> 32) + i;
        }
        std::uint32_t node = 1;  // a leading one, then the bits known so far
        for (int bit = 7; bit >= 0; --bit) {
            std::array<Counter*, kInputs> counters;
            for (int i = 0; i < kInputs; ++i)
                counters[i] = &tables_[i][((seeds[i] ^ (node * 0x85ebca6bu)) * 0xc2b2ae35u) >> (32 - bits_)];
            int known = 0;  // how long a context was seen before: longer ones are trusted more
            while (known < kInputs - 1 && counters[known + 1]->seen()) ++known;
            node = 2 * node + mixer_.code(coder, known, counters, kWindow, (value >> bit) & 1);
        }
        history_ = (history_ << 8) | (node & 255);
        return static_cast<std::uint8_t>(node);
    }

  private:
    static constexpr int kInputs = 6;
    static constexpr int kOrders[kInputs] = {0, 1, 2, 3, 4, 6};
    static constexpr int kWindow = 127;

    int bits_;
    std::uint64_t history_ = 0;
    std::array<std::vector<Counter>, kInputs> tables_;
    Mixer<kInputs> mixer_{kInputs, 12};
};

}  // namespace

std::vector<std::uint8_t> encode_bytes(std::span<const std::uint8_t> data) {
    Encoder coder;
    ByteModel model(data.size());
    for (const std::uint8_t value : data) model.byte(coder, value);
    coder.finish();
    return coder.take();
}

void decode_bytes(std::span<const std::uint8_t> stream, std::span<std::uint8_t> data) {
    Decoder coder(stream.data(), stream.size());
    ByteModel model(data.size());
    for (std::uint8_t& value : data) value = model.byte(coder, 0);
    coder.finish();
}

}  // namespace pgolf::codec
