// Compiles BOMKERN_KERNELS, an op's header, for AVX2; nothing where the processor is not an x86-64.
#if defined(__x86_64__)
#include "target_avx2.h"
#define BOMKERN_ISA avx2
#include BOMKERN_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
