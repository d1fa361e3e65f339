// Linear prediction of a row's entries from one another, learned on the way, in integers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define PGOLF_X86 1
#endif

namespace pgolf::codec {

// sum of a[i] * b[i] and a[i] += (step * b[i] + 2048) >> 12, modulo 2^16; |step * b[i]| < 2^26; size a multiple of
// kBlock. Both are most of a decoder's work beside the coder itself, and the same integers in every version.
struct Portable {
    static std::int32_t dot(const std::int16_t* a, const std::int16_t* b, std::size_t size) {
        std::int32_t sum = 0;
        for (std::size_t i = 0; i < size; ++i) sum += a[i] * b[i];
        return sum;
    }

    static void move(std::int16_t* a, const std::int16_t* b, int step, std::size_t size) {
        for (std::size_t i = 0; i < size; ++i) a[i] = static_cast<std::int16_t>(a[i] + ((step * b[i] + 2048) >> 12));
    }
};

#ifdef PGOLF_X86
// 16 at once. `step` fits in 16 bits and b[i] in 8, so that the product with 8 b[i], rounded at bit 15, is wanted.
struct Wide {
    __attribute__((target("avx2"))) static std::int32_t dot(const std::int16_t* a, const std::int16_t* b,
                                                            std::size_t size) {
        __m256i sums = _mm256_setzero_si256();
        for (std::size_t i = 0; i < size; i += 16)
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(load(a + i), load(b + i)));
        __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0b01001110));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0b10110001));
        return _mm_cvtsi128_si32(half);
    }

    __attribute__((target("avx2"))) static void move(std::int16_t* a, const std::int16_t* b, int step,
                                                     std::size_t size) {
        const __m256i steps = _mm256_set1_epi16(static_cast<std::int16_t>(step));
        for (std::size_t i = 0; i < size; i += 16) {
            const __m256i moves = _mm256_mulhrs_epi16(_mm256_slli_epi16(load(b + i), 3), steps);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(a + i), _mm256_add_epi16(load(a + i), moves));
        }
    }

  private:
    __attribute__((target("avx2"))) static __m256i load(const std::int16_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
};
#endif

// One weight vector a column, over the (at most kTaps) entries before it in the row, moved by LMS after each entry.
// Entries and errors come scaled: kUnit is a typical entry of the column. Weights are in 1/32768.
class Linear {
  public:
    static constexpr int kTaps = 512;
    static constexpr int kUnit = 16;
    static constexpr int kLimit = 127;  // of an entry and an error: kTaps * kLimit * 32768 < 2^31, no sum overflows

    explicit Linear(std::size_t columns)
        : taps_(std::min<std::size_t>(columns, kTaps)),
          stride_(whole(taps_)),
          weights_(columns * stride_),
          row_(columns + kBlock) {
#ifdef PGOLF_X86
        if (__builtin_cpu_supports("avx2")) dot_ = Wide::dot, move_ = Wide::move;
#endif
    }

    void begin_row() { rows_ += rows_ < kSlowest; }

    // Forget the row's entries: those still to come must be zero, since sums run over whole blocks.
    void clear() { std::fill(row_.begin(), row_.end(), 0); }

    void set(std::size_t column, int entry) {
        row_[column] = static_cast<std::int16_t>(std::clamp(entry, -kLimit, kLimit));
    }

    // The prediction, in 1/32768 of 1/kUnit of a typical entry.
    std::int32_t predict(std::size_t column) const {
        const std::size_t taps = std::min(column, taps_);
        return dot_(&weights_[column * stride_], &row_[column - taps], whole(taps));
    }

    // Columns are nearly uncorrelated, so LMS with a step of 1 / (rows + prior) comes close to least squares with that
    // many rows' worth of belief in zero: w += error * entry / (kUnit^2 * (rows + prior)).
    void update(std::size_t column, int entry, int error) {
        const std::size_t taps = std::min(column, taps_);
        constexpr int one = 32768 / (kUnit * kUnit) * 65536;
        static_assert(kLimit * (one / kPrior) / 16 < 32768);
        const int step =
            std::clamp(error, -kLimit, kLimit) * (one / (kPrior + rows_)) / 16;  // in 1/4096 of a weight's unit
        move_(&weights_[column * stride_], &row_[column - taps], step, whole(taps));
        set(column, entry);
    }

  private:
    static constexpr int kPrior = 4096, kSlowest = 28672;
    static constexpr std::size_t kBlock = 16;

    static std::size_t whole(std::size_t taps) { return (taps + kBlock - 1) / kBlock * kBlock; }

    std::size_t taps_, stride_;
    std::vector<std::int16_t> weights_, row_;
    int rows_ = 0;
    std::int32_t (*dot_)(const std::int16_t*, const std::int16_t*, std::size_t) = Portable::dot;
    void (*move_)(std::int16_t*, const std::int16_t*, int, std::size_t) = Portable::move;
};

}  // namespace pgolf::codec
