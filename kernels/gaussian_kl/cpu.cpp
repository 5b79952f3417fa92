#include "../common/cpu_pick.h"
#include "gaussian_kl.h"

namespace bomkern {
namespace gaussian_kl {
BOMKERN_PICK_CPU_KERNELS
}
}  // namespace bomkern
