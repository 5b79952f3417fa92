#define BOMKERN_KERNELS "../consistency_variance/cpu_rows.h"
#include "../common/compile_baseline.h"
