#define BOMKERN_KERNELS "../total_correlation/cpu.h"
#include "../common/compile_avx2.h"
