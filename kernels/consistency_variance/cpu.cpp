#include "../common/cpu_pick.h"
#include "consistency_variance.h"

namespace bomkern {
namespace consistency_variance {
BOMKERN_PICK_CPU_KERNELS
}
}  // namespace bomkern
