// gaussian_kl on the GPU; common/cuda_op.h says what holds for every op.
//
// One launch, or none in backward where no gradient is wanted; no workspace. The bits do not depend on the number of
// multiprocessors. More than 2^30 correlated blocks of a row are cudaErrorInvalidValue.
#pragma once
#include "../common/cuda_op.h"
#include "gaussian_kl.h"

namespace bomkern {
namespace gaussian_kl {

BOMKERN_CUDA_OP_DECLARE

}  // namespace gaussian_kl
}  // namespace bomkern
