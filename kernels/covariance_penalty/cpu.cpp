#include "../common/cpu_pick.h"
#include "covariance_penalty.h"
BOMKERN_PICK_CPU_KERNELS(covariance_penalty)
