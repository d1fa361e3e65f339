// The trellis search of one warp, and the arithmetic that the kernel shares with csrc/trellis.
//
// Every operation that decides a level is rounded on its own, as there: intrinsics keep nvcc from fusing a product and
// a sum. What is fused here has no influence but through its sign, and that is exact.
#pragma once

#include <cstdint>

#include "common/reduce.cuh"

namespace pgolf::generic::trellises {

// --- Arithmetic ------------------------------------------------------------------------------------------------------

constexpr float kMaxLevel = 127;

// What a search minimizes over an entry's level t: weight * (target - t)^2.
struct Goal {
    float target, weight;
};

__device__ __forceinline__ float in_steps(float w, float step) { return step > 0 ? __fdiv_rn(w, step) : 0.0f; }

// x: the weight in steps; worth: rate / (2 ln 2).
__device__ __forceinline__ Goal goal_of(float x, float variance, float share, float worth) {
    constexpr float least = 1.0f / 3.0f;
    const float product = __fmul_rn(variance, share);
    const float weight = __fadd_rn(1.0f, __fdiv_rn(worth, product < least ? least : product));
    return {__fdiv_rn(x, weight), weight};
}

struct Choice {
    float level, cost;
};

// The level nearest to the target among those of a class, which is t mod 4 = 2 (k & 1) + (s & 1).
__device__ __forceinline__ Choice nearest(const Goal& goal, int of_class) {
    constexpr float round = 12582912;  // 1.5 * 2^23: adding it rounds to an integer
    const float offset = static_cast<float>(of_class), target = goal.target;
    const float clamped = target < -kMaxLevel ? -kMaxLevel : kMaxLevel < target ? kMaxLevel : target;
    const float quarter = __fmul_rn(__fsub_rn(clamped, offset), 0.25f);
    float below = __fsub_rn(__fadd_rn(quarter, round), round);
    if (below > quarter) below = __fsub_rn(below, 1.0f);
    float low = __fadd_rn(__fmul_rn(4.0f, below), offset), high = __fadd_rn(low, 4.0f);
    if (low < -kMaxLevel) low = __fadd_rn(low, 4.0f);
    if (high > kMaxLevel) high = __fsub_rn(high, 4.0f);
    const float to_low = __fsub_rn(target, low), to_high = __fsub_rn(target, high);
    const float cost_low = __fmul_rn(goal.weight, __fmul_rn(to_low, to_low));
    const float cost_high = __fmul_rn(goal.weight, __fmul_rn(to_high, to_high));
    const bool take_low = cost_low < cost_high || (cost_low == cost_high && low * low <= high * high);
    return take_low ? Choice{low, cost_low} : Choice{high, cost_high};
}

// The costs of a row's four classes, once for each lane's view of them: entry i of view q is that of class i ^ q.
constexpr int kViews = 4;

__device__ __forceinline__ void price(const Goal& goal, float4* views) {
    float cost[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) cost[i] = nearest(goal, i).cost;
#pragma unroll
    for (int q = 0; q < kViews; ++q) views[q] = make_float4(cost[q], cost[1 ^ q], cost[2 ^ q], cost[3 ^ q]);
}

// --- Where a warp keeps the states -----------------------------------------------------------------------------------

// A trellis step leads from the states s and s ^ 2 g1 to A s and A s ^ g1, where A is the step by an even k. Taken in
// place, both pairs are at the same two positions; a position is a lane (its low bits) and a register (the others).
// Which state a position holds after t steps is linear over GF(2), and the map is chosen so that the two positions
// differ in bit t mod kBits alone: most steps exchange values by one shuffle, the others within a lane. A divides by x
// modulo the polynomial h0, and Horner's scheme for h0,
//     column[0] = 2 g1,   column[i + 1] = x column[i] + (coefficient kBits - 1 - i of h0) 2 g1   (modulo h0),
// ends in column[kBits - 1] = A column[0]: with column[i] as the state of bit (i + t) mod kBits, each step turns the
// map by one bit. What Horner's scheme added must be made up for: at positions where `crossed`, the state before the
// step is the partner of the one that leads here by an even k.
template <int kStates_, int kH0_, int kH1_>
struct Trellis {
    static constexpr int kStates = kStates_, kH0 = kH0_, kG0 = kH0 >> 1, kG1 = kH1_ >> 1, kHalf = kStates / 2;
    static_assert(kHalf <= kG0 && kG0 < kStates && kG1 < kHalf);

    __host__ __device__ static constexpr int log2(int n) { return n > 1 ? 1 + log2(n / 2) : 0; }
    static constexpr int kBits = log2(kStates);
    static constexpr int kLaneBits = kBits < 5 ? kBits : 5;
    static constexpr int kLanes = 1 << kLaneBits;  // of a warp; further ones repeat them
    static constexpr int kSlots = kStates / kLanes;
    // Rows whose decisions share a 32-bit word with a state.
    static constexpr int kPeriods = (32 - kBits) / kBits, kChunk = kPeriods * kBits;

    // The state at a position when t mod kBits = phase.
    __host__ __device__ static constexpr int state(int position, int phase) {
        int column = 2 * kG1, sum = 0;
        for (int i = 0; i < kBits; ++i) {
            if (position >> (i + phase) % kBits & 1) sum ^= column;
            column = column << 1 ^ (column & kHalf ? kH0 : 0) ^ (kH0 >> (kBits - 1 - i) & 1 ? 2 * kG1 : 0);
        }
        return sum;
    }

    __host__ __device__ static constexpr bool crossed(int position, int phase) {
        int sum = 0;
        for (int i = 0; i + 1 < kBits; ++i) sum ^= position >> (i + 1 + phase) % kBits & kH0 >> (kBits - 1 - i) & 1;
        return sum;
    }

    // The class of the levels that keep a state at its position: linear as well.
    __host__ __device__ static constexpr int view(int position, int phase) {
        return 2 * crossed(position, phase) + (state(position, phase) & 1);
    }

    // Whether `crossed` differs from lane to lane.
    __host__ __device__ static constexpr bool crosses_lanes(int phase) {
        bool any = false;
        for (int i = 0; i < kLaneBits; ++i) any = any || crossed(1 << i, phase);
        return any;
    }

    // The state before the one given, and the parity of the level that led from there to here.
    struct Step {
        int state, parity;
    };
    __device__ static Step before(int state, int odd) {
        const int parity = state / kHalf;
        return {2 * ((state ^ (parity ? kG0 : 0) ^ (odd ? kG1 : 0)) % kHalf) + parity, parity};
    }
};

// --- Search ----------------------------------------------------------------------------------------------------------

// One warp's search down a column. Beside its cost each state carries the path that led to it through the rows of the
// chunk: the state before the chunk's first row, then a bit a row, that k is odd. So nothing is to be walked back row
// by row; a chunk's words are written to words[chunk][state at its end].
template <class T>
class Search {
  public:
    // Down the whole column from state 0, the others out of reach.
    __device__ __forceinline__ Search() {
        int lane;
        // Volatile: else what follows from it would be kept in registers between columns, where others need them.
        asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
        lane_ = lane % T::kLanes;
        writes_ = lane < T::kLanes;
#pragma unroll
        for (int i = 0; i < T::kBits; ++i) view_[i] = T::view(lane_, i);
        home_ = T::state(lane_, 0);
#pragma unroll
        for (int j = 0; j < T::kSlots; ++j) cost_[j] = lane_ == 0 && j == 0 ? 0.0f : 1e30f;
        leave();
    }

    // `rows` further rows, a multiple of kChunk unless they are the column's last; `prices` [rows, kViews], `words`
    // those of the first chunk.
    __device__ __forceinline__ void advance(const float4* prices, int rows, uint32_t* words) {
        advance(prices, rows, words, Phases{});
    }

    // The state after the column's last row, in every lane: the cheapest, of several the lowest.
    __device__ __forceinline__ int end(int rows) const {
        float best = cost_[0];
        int state = T::state(lane_, rows % T::kBits);
#pragma unroll
        for (int j = 1; j < T::kSlots; ++j) {
            keep_better(best, state, cost_[j], T::state(lane_ + j * T::kLanes, rows % T::kBits));
        }
#pragma unroll
        for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
            const float cost = __shfl_xor_sync(kAllLanes, best, offset);
            keep_better(best, state, cost, __shfl_xor_sync(kAllLanes, state, offset));
        }
        return state;
    }

  private:
    template <int... i>
    struct Sequence {};
    template <int n, int... i>
    struct UpTo : UpTo<n - 1, n - 1, i...> {};
    template <int... i>
    struct UpTo<0, i...> {
        using type = Sequence<i...>;
    };
    using Phases = typename UpTo<T::kBits>::type;

    __device__ static void keep_better(float& best, int& state, float cost, int other) {
        if (cost < best || (cost == best && other < state)) best = cost, state = other;
    }

    // Paths begin here.
    __device__ __forceinline__ void leave() {
#pragma unroll
        for (int j = 0; j < T::kSlots; ++j) path_[j] = home_ ^ T::state(j * T::kLanes, 0);
    }

    // This lane's view of row `phase` of a period.
    template <int phase>
    __device__ __forceinline__ float4 view(const float4* prices) const {
        return prices[phase * kViews + view_[phase]];
    }

    static constexpr int kAhead = T::kBits < 8 ? T::kBits : 4;  // rows whose prices are loaded before their turn

    template <int... phase>
    __device__ __forceinline__ void advance(const float4* prices, int rows, uint32_t* words, Sequence<phase...>) {
        const int periods = rows / T::kBits, rest = rows % T::kBits;
        float4 price[kAhead];
        if (periods > 0) ((phase < kAhead ? void(price[phase % kAhead] = view<phase>(prices)) : void()), ...);
        int filled = 0;
        for (int period = 0; period < periods; ++period) {
            const float4* const next = period + 1 < periods ? prices + T::kBits * kViews : prices;
            ((step<phase>(price[phase % kAhead]),
              price[phase % kAhead] = view<(phase + kAhead) % T::kBits>(phase + kAhead < T::kBits ? prices : next)),
             ...);
            prices = next;
            if (++filled == T::kPeriods) {
                if (writes_) {
#pragma unroll
                    for (int j = 0; j < T::kSlots; ++j) words[home_ ^ T::state(j * T::kLanes, 0)] = path_[j];
                }
                leave();
                words += T::kStates;
                filled = 0;
            }
        }
        if (periods > 0) prices += T::kBits * kViews;
        ((phase < rest ? step<phase>(view<phase>(prices)) : void()), ...);
        if (writes_ && filled + rest > 0) {
#pragma unroll
            for (int j = 0; j < T::kSlots; ++j) words[T::state(lane_ + j * T::kLanes, rest)] = path_[j];
        }
    }

    // One row. Of two costs the smaller is kept, of equal ones that of an even k.
    template <int phase>
    __device__ __forceinline__ void step(float4 view) {
        const float price[4] = {view.x, view.y, view.z, view.w};
        float own[T::kSlots], sent[T::kSlots], other[T::kSlots];
        uint32_t other_path[T::kSlots];
#pragma unroll
        for (int j = 0; j < T::kSlots; ++j) {
            own[j] = __fadd_rn(cost_[j], price[T::view(j * T::kLanes, phase)]);
            sent[j] = __fadd_rn(cost_[j], price[T::view(j * T::kLanes, phase) ^ 2]);
        }
#pragma unroll
        for (int j = 0; j < T::kSlots; ++j) {
            if constexpr (phase < T::kLaneBits) {
                other[j] = __shfl_xor_sync(kAllLanes, sent[j], 1 << phase);
                other_path[j] = __shfl_xor_sync(kAllLanes, path_[j], 1 << phase);
            } else {
                other[j] = sent[j ^ 1 << (phase - T::kLaneBits)];
                other_path[j] = path_[j ^ 1 << (phase - T::kLaneBits)];
            }
        }
        // -1 in lanes that are `crossed`: bit 1 of their view as a sign.
        const float sign = __uint_as_float(0x3f800000u | static_cast<uint32_t>(view_[phase]) << 30 & 0x80000000u);
#pragma unroll
        for (int j = 0; j < T::kSlots; ++j) {
            // Negative where the odd k is better, and +0 for equal costs: a difference of floats is zero for these
            // alone.
            float excess;
            bool own_is_odd = T::crossed(j * T::kLanes, phase);
            if constexpr (T::crosses_lanes(phase)) {
                const float by = own_is_odd ? -sign : sign;
                excess = __fmaf_rn(other[j], by, -__fmul_rn(own[j], by));
                own_is_odd = by < 0;
            } else {
                excess = own_is_odd ? __fsub_rn(own[j], other[j]) : __fsub_rn(other[j], own[j]);
            }
            const uint32_t path = (excess < 0) != own_is_odd ? other_path[j] : path_[j];
            path_[j] = __funnelshift_l(__float_as_uint(excess), path, 1);  // the sign bit moves in
            cost_[j] = fminf(own[j], other[j]);
        }
    }

    int lane_, home_;  // home: the state of register 0 at a chunk's ends
    bool writes_;
    int view_[T::kBits];
    float cost_[T::kSlots];
    uint32_t path_[T::kSlots];
};

}  // namespace pgolf::generic::trellises
