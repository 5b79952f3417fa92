#include "../common/cpu_pick.h"
#include "total_correlation.h"
BOMKERN_PICK_CPU_KERNELS(total_correlation)
