// Picks the instruction set for min_goal on the CPU.
#include "../common/cpu_features.h"
#include "min_goal.h"

namespace bomkern {
namespace min_goal {

namespace baseline {
extern const CpuKernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
#endif

const CpuKernels& cpu_kernels() {
  static const CpuKernels& best = [&]() -> const CpuKernels& {
#if defined(__x86_64__)
    switch (cpu_isa()) {
      case Isa::avx512: return avx512::kernels;
      case Isa::avx2: return avx2::kernels;
      default: break;
    }
#endif
    return baseline::kernels;
  }();
  return best;
}

}  // namespace min_goal
}  // namespace bomkern
