// Picks the kernels for this CPU among the instruction sets they were compiled for.
#pragma once
#include "cpu_features.h"

// Defines bomkern::op::cpu_kernels() from the `kernels` of the op's namespaces baseline, avx2 and avx512.
#if defined(__x86_64__)
#define BOMKERN_PICK_CPU_KERNELS(op)                                                   \
  namespace bomkern {                                                                  \
  namespace op {                                                                       \
  namespace baseline { extern const CpuKernels kernels; }                              \
  namespace avx2 { extern const CpuKernels kernels; }                                  \
  namespace avx512 { extern const CpuKernels kernels; }                                \
  const CpuKernels& cpu_kernels() {                                                    \
    static const Isa isa = cpu_isa();                                                  \
    return isa == Isa::avx512 ? avx512::kernels : isa == Isa::avx2 ? avx2::kernels : baseline::kernels; \
  }                                                                                    \
  }                                                                                    \
  }
#else
#define BOMKERN_PICK_CPU_KERNELS(op)                      \
  namespace bomkern {                                     \
  namespace op {                                          \
  namespace baseline { extern const CpuKernels kernels; } \
  const CpuKernels& cpu_kernels() { return baseline::kernels; } \
  }                                                       \
  }
#endif
