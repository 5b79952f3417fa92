#include "../common/cpu_pick.h"
#include "consistency_variance.h"
BOMKERN_PICK_CPU_KERNELS(consistency_variance)
