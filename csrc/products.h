// Whether torch's matrix products lose float32's digits by its settings: bomkern/common/products.py in C++.
#pragma once
#include <torch_headers.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace bomkern {

// Whether oneDNN can multiply in TF32, which takes a CPU with AMX for float16.
inline bool cpu_has_tf32() {
#if defined(__x86_64__)
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 21 & 1);
  }();
  return has;
#else
  return false;
#endif
}

// Whether torch multiplies float32 matrices in TF32 or bfloat16 by this backend.
inline bool loses_digits(at::Float32Backend backend) {
  const auto precision = at::globalContext().float32Precision(backend, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::BF16 ||
      (precision == at::Float32Precision::TF32 && (backend == at::Float32Backend::CUDA || cpu_has_tf32()));
}

}  // namespace bomkern
