#define BOMKERN_KERNELS "../gaussian_kl/cpu_rows.h"
#include "../common/compile_avx512.h"
