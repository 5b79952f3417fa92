#define BOMKERN_KERNELS "../active_units/cpu_rows.h"
#include "../common/compile_baseline.h"
