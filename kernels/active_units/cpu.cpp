#include "../common/cpu_pick.h"
#include "active_units.h"
BOMKERN_PICK_CPU_KERNELS(active_units)
