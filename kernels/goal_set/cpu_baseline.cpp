#define BOMKERN_KERNELS "../goal_set/cpu_rows.h"
#include "../common/compile_baseline.h"
