// Vectors, and the few functions on them, for one instruction set.
//
// Included once in each instruction set's translation unit, inside which BOMKERN_ISA names a namespace of its own: the
// linker would otherwise keep one copy of an inline function for all, and it might be the one this CPU cannot run. For
// the same reason nothing here calls an inline function of the standard library.
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dtype.h"

#ifndef BOMKERN_ISA
#error "define BOMKERN_ISA (a namespace) and BOMKERN_VECTOR_BYTES before including simd.h"
#endif

#define BOMKERN_HD inline

namespace bomkern {
namespace BOMKERN_ISA {

typedef float VecF __attribute__((vector_size(BOMKERN_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(BOMKERN_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(BOMKERN_VECTOR_BYTES)));
typedef uint16_t VecH __attribute__((vector_size(BOMKERN_VECTOR_BYTES / 2)));
typedef double VecD __attribute__((vector_size(BOMKERN_VECTOR_BYTES)));
typedef int64_t VecL __attribute__((vector_size(BOMKERN_VECTOR_BYTES)));

template <class S> struct Lanes;
template <> struct Lanes<float> {
  typedef VecF Vec;
  typedef VecI Int;
  typedef uint8_t Bytes __attribute__((vector_size(BOMKERN_VECTOR_BYTES / 4)));
  static constexpr int width = sizeof(VecF) / sizeof(float);
};
template <> struct Lanes<double> {
  typedef VecD Vec;
  typedef VecL Int;
  typedef uint8_t Bytes __attribute__((vector_size(BOMKERN_VECTOR_BYTES / 8)));
  static constexpr int width = sizeof(VecD) / sizeof(double);
};

#if defined(BOMKERN_AVX512)
constexpr __mmask16 all_lanes = 0xffff;  // the plain forms of these intrinsics warn of what they leave out, in g++ 12
#endif

template <class V, class S> inline V splat(S value) { return value - V{}; }

template <class V> inline V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
template <class V> inline void store(void* to, V v) { __builtin_memcpy(to, &v, sizeof v); }
template <class To, class From> inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  To to;
  __builtin_memcpy(&to, &v, sizeof to);
  return to;
}

// Whether any lane of a mask is set.
template <class M> inline bool any(M mask) {
  uint64_t word[sizeof(M) / 8], all = 0;
  __builtin_memcpy(word, &mask, sizeof mask);
  for (size_t i = 0; i < sizeof(M) / 8; ++i) all |= word[i];
  return all != 0;
}

// Where there is an instruction for it, that is four times as fast.
inline VecF half_to_float(VecH half) {
#if defined(BOMKERN_AVX512)
  return (VecF)_mm512_maskz_cvtph_ps(all_lanes, (__m256i)half);
#elif defined(__x86_64__) && BOMKERN_VECTOR_BYTES == 32
  return (VecF)_mm256_cvtph_ps((__m128i)half);
#endif
  const VecU h = __builtin_convertvector(half, VecU);
  const VecU magnitude = (h & 0x7fffu) << 13;
  // The multiplication moves the exponent's bias and makes subnormal halves normal, exactly.
  const VecU number = bits<VecU>(bits<VecF>(magnitude) * 0x1p112f);
  const VecU special = magnitude | 0x7f800000u;
  return bits<VecF>(((h & 0x8000u) << 16) | (magnitude >= 0x0f800000u ? special : number));
}

inline VecF bfloat_to_float(VecH half) { return bits<VecF>(__builtin_convertvector(half, VecU) << 16); }

inline float widen(uint16_t half, bool bfloat) {
  VecH v{};
  v[0] = half;
  return (bfloat ? bfloat_to_float(v) : half_to_float(v))[0];
}

template <class S> S load_one(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(data)[i];
    case DType::f64: return static_cast<S>(static_cast<const double*>(data)[i]);
    default: return widen(static_cast<const uint16_t*>(data)[i], dtype == DType::bf16);
  }
}

// The larger of each pair; where x is NaN, x. One instruction, which compilers do not make of a comparison.
inline VecF at_least(VecF x, float bound) {
#if defined(BOMKERN_AVX512)
  return (VecF)_mm512_maskz_max_ps(all_lanes, _mm512_set1_ps(bound), (__m512)x);
#elif defined(__x86_64__) && BOMKERN_VECTOR_BYTES == 32
  return (VecF)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x);
#elif defined(__x86_64__) && BOMKERN_VECTOR_BYTES == 16
  return (VecF)_mm_max_ps(_mm_set1_ps(bound), (__m128)x);
#else
  return x < bound ? splat<VecF>(bound) : x;
#endif
}

// The smaller of each pair; where x is NaN, x.
inline VecF at_most(VecF x, float bound) {
#if defined(BOMKERN_AVX512)
  return (VecF)_mm512_maskz_min_ps(all_lanes, _mm512_set1_ps(bound), (__m512)x);
#elif defined(__x86_64__) && BOMKERN_VECTOR_BYTES == 32
  return (VecF)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)x);
#elif defined(__x86_64__) && BOMKERN_VECTOR_BYTES == 16
  return (VecF)_mm_min_ps(_mm_set1_ps(bound), (__m128)x);
#else
  return x > bound ? splat<VecF>(bound) : x;
#endif
}
inline VecD at_least(VecD x, double bound) { return x < bound ? splat<VecD>(bound) : x; }
inline VecD at_most(VecD x, double bound) { return x > bound ? splat<VecD>(bound) : x; }

// x = 2^exponent (1 + fraction), the mantissa in [sqrt(1/2), sqrt(2)) so that a logarithm stays relative near 1.
struct Split {
  VecF exponent, fraction;
};
inline Split split_of(VecF x) {
  const VecI tiny = x < 0x1p-126f;
  const VecF scaled = tiny ? x * 0x1p23f : x;
  const VecI offset = bits<VecI>(scaled) - 0x3f3504f3;
  const VecI exponent = offset >> 23;
  return {__builtin_convertvector(exponent + (tiny & -23), VecF),
          bits<VecF>(bits<VecI>(scaled) - (exponent << 23)) - 1.0f};
}

// log(1 + f) - f for a fraction of split_of.
inline VecF log1p_rest(VecF f) {
  VecF p = f * -0.07634493f + 0.12761575f;
  p = p * f - 0.13160183f;
  p = p * f + 0.14201759f;
  p = p * f - 0.16623357f;
  p = p * f + 0.20001227f;
  p = p * f - 0.2500082f;
  p = p * f + 0.3333333f;
  const VecF square = f * f;
  return (square * f) * p - 0.5f * square;
}

// log x for x > 0, subnormals included; inf and NaN pass through. Below 1 ulp (tests/native/test_simd.py).
inline VecF log_of(VecF x) {
  const Split s = split_of(x);
  // ln 2 in two parts; the first has few enough bits that exponent * part is exact.
  const VecF low = log1p_rest(s.fraction) + s.exponent * -2.12194440e-4f;
  const VecF value = (low + s.fraction) + s.exponent * 0.693359375f;
  return x < __builtin_inff() ? value : x;
}

// log2 x, as log_of. Below 1.5 ulp (tests/native/test_simd.py).
inline VecF log2_of(VecF x) {
  const Split s = split_of(x);
  // log2(e) and the fraction in two parts each, the first of 12 bits: their product is exact.
  const VecF rest = log1p_rest(s.fraction), high = bits<VecF>(bits<VecI>(s.fraction) & ~0xfff);
  const VecF low = (s.fraction - high) + rest;
  const VecF value = (low * 1.44269504f + high * 3.1222839e-4f) + high * 1.4423828125f + s.exponent;
  return x < __builtin_inff() ? value : x;
}

// The result of exp2_parts for an x far below 0. `floor`: 2^-125. `bounded`: the caller guarantees x >= -125. `zero`:
// exactly 0 below -63.5, for weights that gradients multiply. Beside a weight of 1 such a weight adds nothing, but its
// products would be subnormal numbers, each of which costs a hundred cycles.
enum class Low { floor, bounded, zero };
// With Low::zero, x * scale is 2^x / zero_unit: the caller multiplies by it. So a scale of 0 needs no comparison.
constexpr float zero_unit = 0x1p63f;

// 2^x = x * scale for N vectors at once, x changed in place: whoever sums them multiplies and adds in one instruction.
// For x <= 127, and 2^0 is 1. NaN passes through. Below 2.2 ulp (tests/native/test_simd.py). Stage by stage, because a chain of
// a dozen dependent instructions does not fill the machine on its own.
template <Low low = Low::floor, int N> inline void exp2_parts(VecF (&x)[N], VecF (&scale)[N]) {
  constexpr int bias = low == Low::zero ? 64 : 127;
  constexpr float magic = 0x1.8p23f + bias;  // x + magic holds round(x) + bias, an exponent field, in its low bits
  VecF p[N];
  if constexpr (low != Low::bounded) {
    for (int i = 0; i < N; ++i) x[i] = at_least(x[i], low == Low::zero ? -64.0f : -125.0f);
  }
  for (int i = 0; i < N; ++i) scale[i] = x[i] + magic;
  for (int i = 0; i < N; ++i) p[i] = scale[i] - magic;
  for (int i = 0; i < N; ++i) x[i] -= p[i];
  // Minimax on [-1/2, 1/2] with p(0) = 1: relative error 9.3e-8.
  for (int i = 0; i < N; ++i) p[i] = x[i] * 0.00132695213f + 0.00967129134f;
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + 0.0555071086f;
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + 0.240222469f;
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + 0.693147004f;
  for (int i = 0; i < N; ++i) x[i] = p[i] * x[i] + 1.0f;
  for (int i = 0; i < N; ++i) scale[i] = bits<VecF>(bits<VecI>(scale[i]) << 23);
}

// exp x; above 88.7228 inf, below -86.6 zero, NaN passes through. Below 1 ulp (tests/native/test_simd.py).
inline VecF exp_of(VecF x) {
  const VecF clamped = x > 88.8f ? splat<VecF>(88.8f) : (x < -86.6f ? splat<VecF>(-86.6f) : x);
  const VecF shifted = clamped * 1.44269504f + 0x1.8p23f;
  const VecF n = shifted - 0x1.8p23f;
  const VecF r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  VecF p = r * 0.0013814613f + 0.00836871f;
  p = p * r + 0.04166839f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999994f;
  const VecF mantissa = (r * r) * p + r + 1.0f;
  const VecI scale = (bits<VecI>(shifted) + 127) << 23;
  // n = 128 would overflow the exponent field: split the factor in two.
  const VecF value = mantissa * bits<VecF>(scale - (1 << 23)) * 2.0f;
  const VecF bounded = x < -86.6f ? splat<VecF>(0.0f) : (x > 88.72283f ? splat<VecF>(__builtin_inff()) : value);
  return x == x ? bounded : x;
}

// e^x for N vectors at once, in place, stage by stage as exp2_parts. For x <= 88; below -87 it stays at e^-87. NaN passes
// through. Below 1.2 ulp (tests/native/test_simd.py).
template <int N> inline void exp_all(VecF (&x)[N]) {
  constexpr float magic = 0x1.8p23f + 127;
  VecF scale[N], n[N], p[N];
  for (int i = 0; i < N; ++i) x[i] = at_least(x[i], -87.0f);
  for (int i = 0; i < N; ++i) scale[i] = x[i] * 1.44269504f + magic;
  for (int i = 0; i < N; ++i) n[i] = scale[i] - magic;
  for (int i = 0; i < N; ++i) x[i] -= n[i] * 0.693359375f;
  for (int i = 0; i < N; ++i) x[i] -= n[i] * -2.12194440e-4f;
  for (int i = 0; i < N; ++i) p[i] = x[i] * 0.0013814613f + 0.00836871f;
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + 0.04166839f;
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + 0.16666521f;
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + 0.49999994f;
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + 1.0f;
  for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + 1.0f;
  for (int i = 0; i < N; ++i) x[i] = p[i] * bits<VecF>(bits<VecI>(scale[i]) << 23);
}

template <class F> inline VecD each_lane(VecD x, F f) {
  for (int i = 0; i < Lanes<double>::width; ++i) x[i] = f(x[i]);
  return x;
}
inline VecD log_of(VecD x) {
  return each_lane(x, [](double v) { return __builtin_log(v); });
}
inline VecD exp_of(VecD x) {
  return each_lane(x, [](double v) { return __builtin_exp(v); });
}
template <int N> inline void exp_all(VecD (&x)[N]) {
  for (int i = 0; i < N; ++i) x[i] = exp_of(x[i]);
}
inline VecD log2_of(VecD x) {
  return each_lane(x, [](double v) { return __builtin_log2(v); });
}
template <Low low = Low::floor, int N> inline void exp2_parts(VecD (&x)[N], VecD (&scale)[N]) {
  for (int i = 0; i < N; ++i) {
    x[i] = each_lane(x[i], [](double v) { return low == Low::zero && v < -512 ? 0 : __builtin_exp2(v); });
    scale[i] = splat<VecD>(low == Low::zero ? 1 / double(zero_unit) : 1.0);
  }
}

template <class V> inline V exp2_of(V x) {
  V value[1] = {x}, scale[1];
  exp2_parts(value, scale);
  return value[0] * scale[0];
}

// A running sum that keeps what rounding drops (Knuth's TwoSum). Infinities and NaN come out as a plain sum gives them.
template <class V> struct Sum {
  V high{}, low{};
  void add(V x) {
    const V total = high + x, part = total - high;
    low += (high - (total - part)) + (x - part);
    high = total;
  }
  double value() const {
    double sum = 0;
    for (size_t i = 0; i < sizeof(V) / sizeof(high[0]); ++i) {
      const double h = high[i], l = low[i];
      sum += h - h == 0 ? h + l : h;
    }
    return sum;
  }
};

}  // namespace BOMKERN_ISA
}  // namespace bomkern
