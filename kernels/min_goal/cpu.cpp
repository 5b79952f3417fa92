#include "../common/cpu_pick.h"
#include "min_goal.h"
BOMKERN_PICK_CPU_KERNELS(min_goal)
