#include "../common/cpu_pick.h"
#include "total_correlation.h"

namespace bomkern {
namespace total_correlation {
BOMKERN_PICK_CPU_KERNELS
}
}  // namespace bomkern
