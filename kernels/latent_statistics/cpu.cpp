#include "../common/cpu_pick.h"
#include "latent_statistics.h"
BOMKERN_PICK_CPU_KERNELS(latent_statistics)
