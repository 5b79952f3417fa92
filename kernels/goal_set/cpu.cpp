#include "../common/cpu_pick.h"
#include "goal_set.h"

namespace bomkern {
namespace goal_set {
BOMKERN_PICK_CPU_KERNELS
}
}  // namespace bomkern
