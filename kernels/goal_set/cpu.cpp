#include "../common/cpu_pick.h"
#include "goal_set.h"
BOMKERN_PICK_CPU_KERNELS(goal_set)
