#include "../common/cpu_pick.h"
#include "latent_statistics.h"

namespace bomkern {
namespace latent_statistics {
BOMKERN_PICK_CPU_KERNELS
}
}  // namespace bomkern
