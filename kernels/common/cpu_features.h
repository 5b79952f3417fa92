// The instruction set to use. Tests can lower it by BOMKERN_SIMD: baseline, avx2 or avx512.
#pragma once
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace bomkern {

enum class Isa { baseline, avx2, avx512 };

inline Isa cpu_isa() {
  Isa isa = Isa::baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // __builtin_cpu_supports knows no "f16c" in older clang: the bit is read here. Saved registers are those of AVX.
  unsigned eax, ebx, ecx, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c) {
    isa = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      isa = Isa::avx512;
  }
#endif
  const char* wish = std::getenv("BOMKERN_SIMD");
  if (wish && !std::strcmp(wish, "baseline")) return Isa::baseline;
  if (wish && !std::strcmp(wish, "avx2") && isa == Isa::avx512) return Isa::avx2;
  return isa;
}

}  // namespace bomkern
