#if defined(__x86_64__)
#include "../common/target_avx2.h"
#define BOMKERN_ISA avx2
#include "cpu_rows.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
