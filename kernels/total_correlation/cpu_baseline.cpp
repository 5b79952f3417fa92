#define BOMKERN_KERNELS "../total_correlation/cpu.h"
#include "../common/compile_baseline.h"
