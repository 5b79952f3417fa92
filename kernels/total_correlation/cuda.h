// total_correlation on the GPU; common/cuda_op.h says what holds for every op.
//
// Forward writes every output, of which none may be null; backward writes every gradient that is not null. More than
// max_cuda_dims<S> dimensions or 2^30 components are cudaErrorInvalidValue, and so are rows [first, first + rows) that are
// not all in the batch.
#pragma once
#include "../common/cuda_op.h"
#include "total_correlation.h"

namespace bomkern {
namespace total_correlation {

// The dimensions of one row that a block's registers and shared memory hold.
template <class S> constexpr int64_t max_cuda_dims = 8192 / int64_t(sizeof(S));

BOMKERN_CUDA_OP_DECLARE

}  // namespace total_correlation
}  // namespace bomkern
