#define BOMKERN_KERNELS "../total_correlation/cpu.h"
#include "../common/compile_avx512.h"
