#if defined(__x86_64__)
#include "../common/target_avx512.h"
#define BOMKERN_ISA avx512
#include "cpu.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
