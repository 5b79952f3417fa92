// goal_set on an NVIDIA GPU of compute capability 8.0 or later: what the bridge calls. No torch here.
//
// All pointers are device memory of the current device; the caller sets the device guard. Launches are asynchronous on
// the stream, safe in a CUDA graph, and share no state with one another. No output needs to be initialised, and two
// runs give the same bits.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

#include "goal_set.h"
#include "keep.h"

namespace bomkern {
namespace goal_set {

// Bytes needed at `workspace`, aligned to 16, on the current device; 0 where one block has all samples, or all of a sum.
template <class S> size_t cuda_workspace(const Forward<S>& a);
template <class S> size_t cuda_workspace(const Backward<S>& a);

// One launch.
template <class S> cudaError_t cuda_run(const Forward<S>& a, void* workspace, cudaStream_t stream);
// One launch, two where cuda_workspace() is not 0, none where there are no outputs.
template <class S> cudaError_t cuda_run(const Backward<S>& a, void* workspace, cudaStream_t stream);

// One launch.
template <class S, class T> cudaError_t cuda_run(const Keep<S, T>& a, cudaStream_t stream);

extern template size_t cuda_workspace(const Forward<float>&);
extern template size_t cuda_workspace(const Forward<double>&);
extern template size_t cuda_workspace(const Backward<float>&);
extern template size_t cuda_workspace(const Backward<double>&);
extern template cudaError_t cuda_run(const Forward<float>&, void*, cudaStream_t);
extern template cudaError_t cuda_run(const Forward<double>&, void*, cudaStream_t);
extern template cudaError_t cuda_run(const Backward<float>&, void*, cudaStream_t);
extern template cudaError_t cuda_run(const Backward<double>&, void*, cudaStream_t);
extern template cudaError_t cuda_run(const Keep<float, float>&, cudaStream_t);
extern template cudaError_t cuda_run(const Keep<float, double>&, cudaStream_t);
extern template cudaError_t cuda_run(const Keep<double, float>&, cudaStream_t);
extern template cudaError_t cuda_run(const Keep<double, double>&, cudaStream_t);

}  // namespace goal_set
}  // namespace bomkern
