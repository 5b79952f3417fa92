#include "../common/cpu_pick.h"
#include "min_goal.h"

namespace bomkern {
namespace min_goal {
BOMKERN_PICK_CPU_KERNELS
}
}  // namespace bomkern
