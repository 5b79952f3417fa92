#define BOMKERN_KERNELS "../latent_statistics/cpu_rows.h"
#include "../common/compile_avx512.h"
