// Measures the vector exp2 alone, and prints the least nanoseconds per exponential on one thread.
// The target header comes first, as in the kernels: -DTARGET=\"target_avx2.h\" or nothing.
#ifdef TARGET
#include TARGET
#else
#define BOMKERN_VECTOR_BYTES 16
#endif
#define BOMKERN_ISA measured
#include "simd.h"

#include <stdio.h>
#include <time.h>

using namespace bomkern::measured;

#if defined(__aarch64__)
#define VECTOR_REGISTER "w"
#else
#define VECTOR_REGISTER "v"
#endif

static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Keeps `streams` exponentials in flight in registers; loads and stores occur only where the registers do not suffice.
template <int streams> static double nanoseconds() {
  constexpr int rounds = 30;
  constexpr int64_t turns = (1 << 20) / streams;
  const VecF start = splat<VecF>(-0.7f);
  double best = 1e9;
  for (int round = 0; round < rounds; ++round) {
    const double begin = now();
    for (int64_t turn = 0; turn < turns; ++turn) {
      VecF x[streams];
      // The empty statements emit no instructions, but the compiler must assume that they write and read x.
#pragma GCC unroll 8
      for (int i = 0; i < streams; ++i) {
        x[i] = start;
        __asm__ volatile("" : "+" VECTOR_REGISTER(x[i]));
      }
#pragma GCC unroll 8
      for (int i = 0; i < streams; ++i) x[i] = exp2_of(x[i]);
#pragma GCC unroll 8
      for (int i = 0; i < streams; ++i) __asm__ volatile("" : : VECTOR_REGISTER(x[i]));
    }
    const double seconds = now() - begin;
    if (seconds < best) best = seconds;
  }
  return best * 1e9 / ((double)turns * streams * Lanes<float>::width);
}

int main() {
  // The best number of streams fills the pipes without spilling: it depends on the registers, 16, or 32 with AVX-512
  // and NEON.
  const double costs[] = {nanoseconds<2>(), nanoseconds<4>(), nanoseconds<8>()};
  double least = costs[0];
  for (const double cost : costs) least = cost < least ? cost : least;
  printf("%.5f\n", least);
}
