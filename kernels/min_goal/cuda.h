// min_goal on an NVIDIA GPU of compute capability 8.0 or later: what the bridge calls. No torch here.
//
// All pointers are device memory of the current device; the caller sets the device guard. Launches are asynchronous on
// the stream, safe in a CUDA graph, and share no state with one another. No output needs to be initialised.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

#include "min_goal.h"

namespace bomkern {
namespace min_goal {

// Bytes that cuda_forward() needs at `workspace` (16-byte aligned, uninitialised) on the current device; mostly 0.
template <class S> size_t cuda_forward_workspace(const Forward<S>& a);

// Writes every output of `a` that is not null. One launch, or two where cuda_forward_workspace() is not 0.
// `bottleneck` being null means that no stats are wanted. For Reduction::min `winner` is left alone.
template <class S> cudaError_t cuda_forward(const Forward<S>& a, void* workspace, cudaStream_t stream);

// The same of cuda_backward(): not 0 where goals without a batch dimension have more samples than one block adds up.
template <class S> size_t cuda_backward_workspace(const Backward<S>& a);

// Writes every element of every output. One launch, two where cuda_backward_workspace() is not 0, none without outputs.
template <class S> cudaError_t cuda_backward(const Backward<S>& a, void* workspace, cudaStream_t stream);

extern template size_t cuda_forward_workspace<float>(const Forward<float>&);
extern template size_t cuda_forward_workspace<double>(const Forward<double>&);
extern template cudaError_t cuda_forward<float>(const Forward<float>&, void*, cudaStream_t);
extern template cudaError_t cuda_forward<double>(const Forward<double>&, void*, cudaStream_t);
extern template size_t cuda_backward_workspace<float>(const Backward<float>&);
extern template size_t cuda_backward_workspace<double>(const Backward<double>&);
extern template cudaError_t cuda_backward<float>(const Backward<float>&, void*, cudaStream_t);
extern template cudaError_t cuda_backward<double>(const Backward<double>&, void*, cudaStream_t);

}  // namespace min_goal
}  // namespace bomkern
