#include "../common/cpu_pick.h"
#include "covariance_penalty.h"

namespace bomkern {
namespace covariance_penalty {
BOMKERN_PICK_CPU_KERNELS
}
}  // namespace bomkern
