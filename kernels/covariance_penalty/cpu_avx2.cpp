#define BOMKERN_KERNELS "../covariance_penalty/cpu.h"
#include "../common/compile_avx2.h"
