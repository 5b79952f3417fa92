#define BOMKERN_KERNELS "../consistency_variance/cpu_rows.h"
#include "../common/compile_avx2.h"
