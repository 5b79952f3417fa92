// goal_set on the GPU; common/cuda_op.h says what holds for every op.
//
// Forward is one launch. Backward is one launch, two where it needs a workspace, none where there are no outputs. There is
// no workspace where one block has all samples, or all of a sum.
#pragma once
#include "../common/cuda_op.h"
#include "goal_set.h"
#include "keep.h"

namespace bomkern {
namespace goal_set {

BOMKERN_CUDA_OP_DECLARE

// One launch, without a workspace.
template <class S, class T> cudaError_t cuda_run(const Keep<S, T>& a, cudaStream_t stream);

extern template cudaError_t cuda_run(const Keep<float, float>&, cudaStream_t);
extern template cudaError_t cuda_run(const Keep<float, double>&, cudaStream_t);
extern template cudaError_t cuda_run(const Keep<double, float>&, cudaStream_t);
extern template cudaError_t cuda_run(const Keep<double, double>&, cudaStream_t);

}  // namespace goal_set
}  // namespace bomkern
