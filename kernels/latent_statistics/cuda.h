// latent_statistics on the GPU; common/cuda_op.h says what holds for every op.
//
// One launch, in forward a cooperative one where the grid has more than one block, and none in backward where no gradient
// is wanted. Backward needs no workspace. The bits do not depend on the number of multiprocessors.
#pragma once
#include "../common/cuda_op.h"
#include "latent_statistics.h"

namespace bomkern {
namespace latent_statistics {

BOMKERN_CUDA_OP_DECLARE

}  // namespace latent_statistics
}  // namespace bomkern
