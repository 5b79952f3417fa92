// Largest error in ulp of log_of, exp_of, log2_of, exp2_of, exp_all and exp2_parts<Low::zero> over a dense grid of floats,
// against double. Prints "log exp log2 exp2 exp_all exp2_zero".
// The target header comes first, as in the kernels: -DTARGET=\"target_avx2.h\" or nothing.
#ifdef TARGET
#include TARGET
#else
#define BOMKERN_VECTOR_BYTES 16
#endif
#define BOMKERN_ISA tested
#include "simd.h"

#include <math.h>
#include <stdio.h>

using namespace bomkern::tested;

static double ulps(float got, double want) {
  if (isnan(want)) return isnan(got) ? 0 : INFINITY;
  const float rounded = (float)want;
  if (got == rounded) return fabs((double)got - want) / (nextafterf(fabsf(rounded), INFINITY) - fabsf(rounded) + 1e-300);
  if (isinf(rounded) || isinf(got)) return INFINITY;
  return fabs((double)got - want) / ((double)nextafterf(fabsf(rounded), INFINITY) - fabsf(rounded));
}

template <class Ours, class Exact> static double worst(uint32_t first, uint32_t last, uint32_t step, Ours ours, Exact exact) {
  double most = 0;
  constexpr int width = Lanes<float>::width;
  for (uint64_t word = first; word <= last; word += (uint64_t)step * width) {
    VecU words;
    for (int i = 0; i < width; ++i) words[i] = word + (uint64_t)step * i <= last ? (uint32_t)(word + (uint64_t)step * i) : last;
    const VecF x = bits<VecF>(words), y = ours(x);
    for (int i = 0; i < width; ++i) {
      const double error = ulps(y[i], exact((double)x[i]));
      if (error > most) most = error;
    }
  }
  return most;
}

int main() {
  // Every 61st float from the smallest subnormal to inf and NaN, and each one of the two octaves around 1.
  auto log_v = [](VecF x) { return log_of(x); };
  auto log_d = [](double x) { return log(x); };
  double l = worst(1, 0x7fc00000, 61, log_v, log_d);
  l = fmax(l, worst(0x3f000000, 0x40000000, 1, log_v, log_d));
  // exp flushes below -86.6 (1e-38 of a score of 1) and is exact about inf and NaN.
  auto exp_v = [](VecF x) { return exp_of(x); };
  auto exp_d = [](double x) { return exp(x); };
  double e = worst(0, 0x42b17217, 31, exp_v, exp_d);                        // 0 .. 88.72
  e = fmax(e, worst(0x80000000u, 0x80000000u | 0x42ad3333u, 31, exp_v, exp_d));  // -0 .. -86.6
  e = fmax(e, worst(0x7f800000, 0x7fc00000, 0x400000, exp_v, exp_d));
  auto log2_v = [](VecF x) { return log2_of(x); };
  auto log2_d = [](double x) { return log2(x); };
  double l2 = worst(1, 0x7fc00000, 61, log2_v, log2_d);
  l2 = fmax(l2, worst(0x3f000000, 0x40000000, 1, log2_v, log2_d));
  // exp2 stays at 2^-125 below -125.
  auto exp2_v = [](VecF x) { return exp2_of(x); };
  auto exp2_d = [](double x) { return exp2(x < -125 ? -125 : x); };
  double e2 = worst(0, 0x42fe0000, 31, exp2_v, exp2_d);                                // 0 .. 127
  e2 = fmax(e2, worst(0x80000000u, 0xff800000u, 31, exp2_v, exp2_d));                  // -0 .. -inf
  e2 = fmax(e2, worst(0xbf800000u, 0xc1000000u, 1, exp2_v, exp2_d));                   // every float from -1 to -8
  e2 = fmax(e2, worst(0x7fc00000, 0x7fc00000, 1, exp2_v, exp2_d));                     // NaN
  // exp_all stays at e^-87 below -87.
  auto all_v = [](VecF x) {
    VecF v[1] = {x};
    exp_all(v);
    return v[0];
  };
  auto all_d = [](double x) { return exp(x < -87 ? -87 : x); };
  double ea = worst(0, 0x42b00000, 31, all_v, all_d);                                  // 0 .. 88
  ea = fmax(ea, worst(0x80000000u, 0xff800000u, 31, all_v, all_d));                    // -0 .. -inf
  ea = fmax(ea, worst(0x7fc00000, 0x7fc00000, 1, all_v, all_d));                       // NaN
  // exp2_parts<Low::zero> is exactly 0 from -63.5 on.
  auto zero_v = [](VecF x) {
    VecF v[1] = {x}, scale[1];
    exp2_parts<Low::zero>(v, scale);
    return v[0] * (scale[0] * zero_unit);
  };
  auto zero_d = [](double x) { return x <= -63.5 ? 0 : exp2(x); };
  double ez = worst(0, 0x42800000, 31, zero_v, zero_d);                                // 0 .. 64
  ez = fmax(ez, worst(0x80000000u, 0xff800000u, 31, zero_v, zero_d));                  // -0 .. -inf
  ez = fmax(ez, worst(0x7fc00000, 0x7fc00000, 1, zero_v, zero_d));                     // NaN
  printf("%.4f %.4f %.4f %.4f %.4f %.4f\n", l, e, l2, e2, ea, ez);
}
