// active_units on the GPU; common/cuda_op.h says what holds for every op.
//
// One launch, in forward a cooperative one where the grid has more than one block. Backward needs no workspace. The bits do
// not depend on the number of multiprocessors.
#pragma once
#include "../common/cuda_op.h"
#include "active_units.h"

namespace bomkern {
namespace active_units {

BOMKERN_CUDA_OP_DECLARE

}  // namespace active_units
}  // namespace bomkern
