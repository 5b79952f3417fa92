// CUDA's half-precision numbers, and what looks at the bits of a number, on the CPU.
#pragma once
#include <stdint.h>
#include <string.h>

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }
inline float __half2float(__half h) {
  _Float16 v;
  memcpy(&v, &h, 2);
  return v;
}
inline float __bfloat162float(__nv_bfloat16 h) {
  const uint32_t word = uint32_t(h.bits) << 16;
  float v;
  memcpy(&v, &word, 4);
  return v;
}
inline __half __float2half_rn(float value) {
  const _Float16 h = _Float16(value);
  __half out;
  memcpy(&out, &h, 2);
  return out;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  if (value != value) return {0x7fff};
  return {uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}

template <class To, class From> To emu_bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned bits) { return emu_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return emu_bits<unsigned>(value); }
inline double __longlong_as_double(long long bits) { return emu_bits<double>(bits); }
inline long long __double_as_longlong(double value) { return emu_bits<long long>(value); }
