// consistency_variance on the GPU; common/cuda_op.h says what holds for every op.
//
// One launch, or none in backward where no gradient is wanted; no workspace. The bits do not depend on the number of
// multiprocessors.
#pragma once
#include "../common/cuda_op.h"
#include "consistency_variance.h"

namespace bomkern {
namespace consistency_variance {

BOMKERN_CUDA_OP_DECLARE

}  // namespace consistency_variance
}  // namespace bomkern
