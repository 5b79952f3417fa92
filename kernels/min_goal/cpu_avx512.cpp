#define BOMKERN_KERNELS "../min_goal/cpu_rows.h"
#include "../common/compile_avx512.h"
