// min_goal on the GPU; common/cuda_op.h says what holds for every op.
//
// One launch, or two where there is a workspace, or none in backward without outputs. Forward writes every output that is
// not null; `bottleneck` is null where no stats are wanted. For Reduction::min it leaves `winner` alone. Backward has a
// workspace where goals without a batch dimension have more samples than one block adds up.
#pragma once
#include "../common/cuda_op.h"
#include "min_goal.h"

namespace bomkern {
namespace min_goal {

BOMKERN_CUDA_OP_DECLARE

}  // namespace min_goal
}  // namespace bomkern
