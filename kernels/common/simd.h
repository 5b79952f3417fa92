// Vectors, and the few functions on them, for one instruction set.
//
// Included once in each instruction set's translation unit, inside which BOMKERN_ISA names a namespace of its own: the
// linker would otherwise keep one copy of an inline function for all, and it might be the one this CPU cannot run. For
// the same reason nothing here calls an inline function of the standard library.
#include <stdint.h>
#include <stddef.h>

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

template <class V, class S> inline V splat(S value) { return V{} + value; }

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

// True where any lane of a mask is set.
template <class M> inline bool any(M mask) {
  uint64_t word[sizeof(M) / 8], all = 0;
  __builtin_memcpy(word, &mask, sizeof mask);
  for (size_t i = 0; i < sizeof(M) / 8; ++i) all |= word[i];
  return all != 0;
}

inline VecF half_to_float(VecH half) {
  const VecU h = __builtin_convertvector(half, VecU);
  const VecU magnitude = (h & 0x7fffu) << 13;
  // The multiplication moves the exponent's bias and makes subnormal halves normal, exactly.
  const VecU number = bits<VecU>(bits<VecF>(magnitude) * 0x1p112f);
  const VecU special = magnitude | 0x7f800000u;
  return bits<VecF>(((h & 0x8000u) << 16) | (magnitude >= 0x0f800000u ? special : number));
}

inline VecF bfloat_to_float(VecH half) { return bits<VecF>(__builtin_convertvector(half, VecU) << 16); }

// log x for x > 0, subnormals included; inf and NaN pass through. Below 1 ulp (tests/test_simd.py).
inline VecF log_of(VecF x) {
  const VecI tiny = x < 0x1p-126f;
  const VecF scaled = tiny ? x * 0x1p23f : x;
  // Split so that the mantissa lies in [sqrt(1/2), sqrt(2)) and log stays relative near 1.
  const VecI offset = bits<VecI>(scaled) - 0x3f3504f3;
  const VecI exponent = offset >> 23;
  const VecF f = bits<VecF>(bits<VecI>(scaled) - (exponent << 23)) - 1.0f;
  const VecF e = __builtin_convertvector(exponent + (tiny & -23), VecF);
  VecF p = f * -0.07634493f + 0.12761575f;
  p = p * f - 0.13160183f;
  p = p * f + 0.14201759f;
  p = p * f - 0.16623357f;
  p = p * f + 0.20001227f;
  p = p * f - 0.2500082f;
  p = p * f + 0.3333333f;
  const VecF square = f * f;
  // ln 2 in two parts; the first has few enough bits that e * part is exact.
  const VecF low = (square * f) * p + e * -2.12194440e-4f - 0.5f * square;
  const VecF value = (low + f) + e * 0.693359375f;
  return x < __builtin_inff() ? value : x;
}

// exp x; above 88.7228 inf, below -86.6 zero, NaN passes through. Below 1 ulp (tests/test_simd.py).
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
