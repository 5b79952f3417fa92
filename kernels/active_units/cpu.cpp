#include "../common/cpu_pick.h"
#include "active_units.h"

namespace bomkern {
namespace active_units {
BOMKERN_PICK_CPU_KERNELS
}
}  // namespace bomkern
