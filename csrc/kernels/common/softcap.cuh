// exp(cap tanh(u / cap)) and the slope of its exponent, for epilogues of matrix products: five instructions of the
// special-function unit for two values, and few others.
//
// With w = 2^(2 log2(e) u / cap) = e^(2u / cap) and r = 1 / (1 + w): tanh(u / cap) = 1 - 2 r, its slope
// 1 - tanh^2 = 4 r (1 - r), and e^(cap tanh) = 2^(cap log2(e) (1 - 2 r)). The approximate instructions are off by
// 2^-22 of w and 2^-23 of r, so cap tanh by at most 3 cap 2^-23, near its rounding to float32. (tanh.approx is off
// by 2^-11, a hundredth of a nat at cap 30.)
#pragma once

namespace pgolf {

struct Softcap {
    float inner;       // 2 log2(e) / cap
    float high, fall;  // cap log2(e), and -2 times that: log2 of the result is high + fall r
};

__host__ __device__ __forceinline__ Softcap softcap(float cap) {
    constexpr float kLog2E = 1.44269504f;
    const float high = cap * kLog2E;
    return {2.0f * kLog2E / cap, high, -2.0f * high};
}

// Which cap a logit gets: the same for all, or one by its sign.
struct OneCap {
    Softcap cap;

    __device__ __forceinline__ const Softcap& of(float) const { return cap; }
};

struct TwoCaps {
    Softcap above, elsewhere;

    __device__ __forceinline__ Softcap of(float logit) const { return logit > 0.0f ? above : elsewhere; }
};

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 + e^(2u / cap), at most 2^62: the product of two is finite, and tanh is 1 from 2^25 on. NaN stays NaN.
__device__ __forceinline__ float softcap_denominator(float u, const Softcap& cap) {
    float exponent;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(exponent) : "f"(u * cap.inner), "f"(62.0f));
    return 1.0f + exp2_approx(exponent);
}

// The r of two logits of the same row by one reciprocal. A NaN in one reaches the other: their row is lost either way.
__device__ __forceinline__ void softcap_reciprocals(float u0, float u1, const Softcap& cap0, const Softcap& cap1,
                                                    float& r0, float& r1) {
    const float d0 = softcap_denominator(u0, cap0), d1 = softcap_denominator(u1, cap1);
    const float both = reciprocal_approx(d0 * d1);
    r0 = both * d1;
    r1 = both * d0;
}

__device__ __forceinline__ float softcapped_exp(float r, const Softcap& cap) {
    return exp2_approx(fmaf(cap.fall, r, cap.high));
}

// A quarter of the slope, 1 - tanh^2.
__device__ __forceinline__ float quarter_slope(float r) { return fmaf(-r, r, r); }

}  // namespace pgolf
