// Mathematics for score.h and the GPU kernels: one number per thread, with the names of simd.h. CUDA C++ only.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define BOMKERN_ISA cuda
#define BOMKERN_HD __device__ __forceinline__

// A block's dynamic shared memory (tests/native/cuda_emulator brings its own).
#ifndef BOMKERN_SHARED_BYTES
#define BOMKERN_SHARED_BYTES(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace bomkern {
namespace BOMKERN_ISA {

template <class V, class S> BOMKERN_HD V splat(S value) { return value; }

// The precise functions, not the fast intrinsics: a deficit near 0 must keep its digits.
BOMKERN_HD float log_of(float x) { return logf(x); }
BOMKERN_HD float exp_of(float x) { return expf(x); }
BOMKERN_HD double log_of(double x) { return log(x); }
BOMKERN_HD double exp_of(double x) { return exp(x); }

// Shorter forms of functions of score.h for one float. They have no branch for rare operands, so that all samples and lanes
// execute the same instructions.

// log(1 + y) for y >= -1, 1 ulp. With 3/4 <= (1 + y) / 2^e < 3/2 it is e log 2 + log(1 + m), m = (1 + y) / 2^e - 1, where
// y / 2^e and 1 / 2^e - 1 are exact, so that a small y keeps its digits.
BOMKERN_HD float log1p_of(float y) {
  const uint32_t octave = (__float_as_uint(y + 1.0f) - 0x3f400000u) & 0xff800000u;  // e, where the exponent stands
  const float rest = fmaf(0.25f, __uint_as_float(0x40800000u - octave), -1.0f);
  const float m = __uint_as_float(__float_as_uint(y) - octave) + rest;
  float p = -0x1.6c1ba6p-5f;  // the minimax polynomial of (log(1 + m) - m) / m^2
  p = fmaf(p, m, 0x1.aa0f50p-4f);
  p = fmaf(p, m, -0x1.0d6840p-3f);
  p = fmaf(p, m, 0x1.28ad52p-3f);
  p = fmaf(p, m, -0x1.54f68cp-3f);
  p = fmaf(p, m, 0x1.9967bap-3f);
  p = fmaf(p, m, -0x1.000026p-2f);
  p = fmaf(p, m, 0x1.5555a8p-2f);
  p = fmaf(p, m, -0.5f);
  const float e = float(int32_t(octave)) * 0x1p-23f, log = fmaf(e, 0x1.62e430p-1f, fmaf(p * m, m, m));
  return (y > -1) & (y < __builtin_inff()) ? log : y * __builtin_inff();
}
BOMKERN_HD float log1p_of_square(float size) {
  const bool far = size > 1e8f;
  const float d = log1p_of(far ? size : size * size);
  return far ? d * 2 : d;
}
// 2 ulp; a divisor below 2^-126 counts as 0, one above 2^126 as infinite.
BOMKERN_HD float quotient_of(float a, float b) {
#if defined(__CUDACC__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
#else
  return a / b;
#endif
}
BOMKERN_HD bool worse(float d, float than) { return !(d <= than) & (than == than); }

// 2^x by the hardware, 2 ulp; what is below 2^-126 becomes 0.
BOMKERN_HD float ex2(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126 ? 0.0f : exp2f(x);
#endif
}

// 2^x for x <= 127 without the hardware's exponential: 9 instructions on the FMA pipe and 2 on the ALU; 2 ulp. What is
// below 2^-126 becomes 2^-126; NaN stays NaN.
BOMKERN_HD float ex2_fma(float x) {
#if defined(__CUDACC__)
  asm("max.NaN.f32 %0, %0, 0fC2FC0000;" : "+f"(x));
#else
  x = x < -126 ? -126.0f : x;
#endif
  const float shifted = x + 12583039.0f;  // 1.5 * 2^23 + 127: the nearest integer, biased, stands in the lowest bits
  const float f = x - (shifted - 12583039.0f);
  float p = 0x1.5c08e6p-10f;  // the minimax polynomial of 2^f, |f| <= 1/2
  p = fmaf(p, f, 0x1.3d0c54p-7f);
  p = fmaf(p, f, 0x1.c6b6e4p-5f);
  p = fmaf(p, f, 0x1.ebf918p-3f);
  p = fmaf(p, f, 0x1.62e428p-1f);
  p = fmaf(p, f, 1.0f);
  return p * __uint_as_float(__float_as_uint(shifted) << 23);
}

// Shorter than exp2(), whose many constants cost registers; 2 ulp. What is below 2^-1022 becomes 0; NaN stays NaN.
BOMKERN_HD double ex2(double x) {
  const double shifted = x + 6755399441056767.0;  // 1.5 * 2^52 + 1023
  const double g = 0.69314718055994530942 * (x - (shifted - 6755399441056767.0));
  double p = 1;  // Taylor's polynomial of e^g
#pragma unroll
  for (int k = 13; k > 0; --k) p = fma(p * g, 1.0 / k, 1.0);
  return x < -1022 ? 0.0 : p * __longlong_as_double(__double_as_longlong(shifted) << 52);
}
BOMKERN_HD double ex2_fma(double x) { return ex2(x); }

BOMKERN_HD float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
BOMKERN_HD double fma_of(double a, double b, double c) { return fma(a, b, c); }

BOMKERN_HD float widen(uint16_t half, bool bfloat) {
  return bfloat ? __bfloat162float(__ushort_as_bfloat16(half)) : __half2float(__ushort_as_half(half));
}

// Round to nearest, ties to even.
BOMKERN_HD uint16_t narrow(float value, bool bfloat) {
  return bfloat ? __bfloat16_as_ushort(__float2bfloat16_rn(value)) : __half_as_ushort(__float2half_rn(value));
}

// Four adjacent numbers, moved by the widest access that their size allows.
template <class T> struct alignas(sizeof(T) * 4 < 16 ? sizeof(T) * 4 : 16) Pack {
  T at[4];
};

// Spelled out because the compiler sometimes takes a plain assignment apart into four stores.
BOMKERN_HD void store_16_bytes(void* to, uint4 v) {
#if defined(__CUDACC__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = v;
#endif
}

// Spelled out for the same reason, of doubles.
BOMKERN_HD uint4 load_16_bytes(const void* from) {
#if defined(__CUDACC__)
  uint4 v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return v;
#else
  return *static_cast<const uint4*>(from);
#endif
}

template <class T> BOMKERN_HD void store_pack(T* to, const Pack<T>& pack) {
  if constexpr (sizeof pack >= 16) {
    uint4 words[sizeof pack / 16];
    __builtin_memcpy(words, &pack, sizeof pack);
    for (size_t i = 0; i < sizeof pack / 16; ++i) store_16_bytes(reinterpret_cast<uint4*>(to) + i, words[i]);
  } else {
    *reinterpret_cast<Pack<T>*>(to) = pack;
  }
}

// A running sum that keeps what rounding drops (Knuth's TwoSum); double would be 64 times slower on consumer GPUs.
template <class S> struct Sum {
  S high = 0, low = 0;
  BOMKERN_HD void add(S x) {
    const S total = high + x, part = total - high;
    low += (high - (total - part)) + (x - part);
    high = total;
  }
  // Infinities and NaN come out as a plain sum gives them.
  BOMKERN_HD double value() const { return high - high == 0 ? double(high) + double(low) : double(high); }
  BOMKERN_HD S rounded() const { return high - high == 0 ? high + low : high; }
};

// The sum over a warp, in lane 0; the tree is fixed, so the bits are.
template <class T> BOMKERN_HD T warp_sum(T x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
  return x;
}

}  // namespace BOMKERN_ISA
}  // namespace bomkern
