#if defined(__x86_64__)
#include "../common/target_avx512.h"
#define BOMKERN_ISA avx512
#include "cpu_rows.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
