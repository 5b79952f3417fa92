#define BOMKERN_KERNELS "../min_goal/cpu_rows.h"
#include "../common/compile_baseline.h"
