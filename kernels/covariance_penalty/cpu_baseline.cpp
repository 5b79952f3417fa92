#define BOMKERN_KERNELS "../covariance_penalty/cpu.h"
#include "../common/compile_baseline.h"
