// Compiles BOMKERN_KERNELS, an op's header, for AVX-512; nothing where the processor is not an x86-64.
#if defined(__x86_64__)
#include "target_avx512.h"
#define BOMKERN_ISA avx512
#include BOMKERN_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
