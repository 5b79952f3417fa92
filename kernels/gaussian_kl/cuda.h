// gaussian_kl on an NVIDIA GPU of compute capability 8.0 or later: what the bridge calls. No torch here.
//
// All pointers are device memory of the current device; the caller sets the device guard. Launches are asynchronous on
// the stream, safe in a CUDA graph, and share no state with one another. No output needs to be initialised. Two runs
// give the same bits, whatever the number of multiprocessors.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

#include "gaussian_kl.h"

namespace bomkern {
namespace gaussian_kl {

// Up to 2^30 correlated blocks of a row; more are cudaErrorInvalidValue.
//
// No workspace: always 0 bytes.
template <class S> size_t cuda_workspace(const Forward<S>& a);
template <class S> size_t cuda_workspace(const Backward<S>& a);

// One launch.
template <class S> cudaError_t cuda_run(const Forward<S>& a, void* workspace, cudaStream_t stream);
// One launch, or none where no gradient is wanted.
template <class S> cudaError_t cuda_run(const Backward<S>& a, void* workspace, cudaStream_t stream);

extern template size_t cuda_workspace(const Forward<float>&);
extern template size_t cuda_workspace(const Forward<double>&);
extern template size_t cuda_workspace(const Backward<float>&);
extern template size_t cuda_workspace(const Backward<double>&);
extern template cudaError_t cuda_run(const Forward<float>&, void*, cudaStream_t);
extern template cudaError_t cuda_run(const Forward<double>&, void*, cudaStream_t);
extern template cudaError_t cuda_run(const Backward<float>&, void*, cudaStream_t);
extern template cudaError_t cuda_run(const Backward<double>&, void*, cudaStream_t);

}  // namespace gaussian_kl
}  // namespace bomkern
