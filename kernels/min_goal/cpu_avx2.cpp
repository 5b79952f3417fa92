#define BOMKERN_KERNELS "../min_goal/cpu_rows.h"
#include "../common/compile_avx2.h"
