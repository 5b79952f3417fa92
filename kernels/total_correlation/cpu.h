// total_correlation on the CPU, for the instruction set that the including file names.
#include "cpu_tiles.h"

#include "cpu_backward.h"
#include "cpu_forward.h"

#define BOMKERN_NAME_OF(isa) #isa
#define BOMKERN_NAME(isa) BOMKERN_NAME_OF(isa)

namespace bomkern {
namespace total_correlation {
namespace BOMKERN_ISA {
extern const CpuKernels kernels{
    BOMKERN_NAME(BOMKERN_ISA),
    forward<float>,
    forward<double>,
    backward<float>,
    backward<double>,
    [](int64_t batch, int64_t dims, int64_t size) {
      return size == 4 ? forward_bytes<float>(batch, dims)
                       : forward_bytes<double>(batch, dims);
    },
    [](int64_t batch, int64_t dims, int64_t size) {
      return size == 4 ? backward_bytes<float>(batch, dims)
                       : backward_bytes<double>(batch, dims);
    },
};
}  // namespace BOMKERN_ISA
}  // namespace total_correlation
}  // namespace bomkern
