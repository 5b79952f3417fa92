#define BOMKERN_KERNELS "../latent_statistics/cpu_rows.h"
#include "../common/compile_baseline.h"
