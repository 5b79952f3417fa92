// total_correlation on the CPU, for the instruction set that the including file names.
#include "cpu_tiles.h"

#include "cpu_backward.h"
#include "cpu_forward.h"

namespace bomkern {
namespace total_correlation {
namespace BOMKERN_ISA {

BOMKERN_CPU_OP

}  // namespace BOMKERN_ISA
}  // namespace total_correlation
}  // namespace bomkern
