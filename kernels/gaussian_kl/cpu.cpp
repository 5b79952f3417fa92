#include "../common/cpu_pick.h"
#include "gaussian_kl.h"
BOMKERN_PICK_CPU_KERNELS(gaussian_kl)
