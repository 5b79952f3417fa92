// total_correlation on an NVIDIA GPU of compute capability 8.0 or later: what the bridge calls. No torch here.
//
// All pointers are device memory of the current device; the caller sets the device guard. Launches are asynchronous on
// the stream, safe in a CUDA graph, and share no state with one another. No output needs to be initialised, and two
// runs on the same kind of device give the same bits. At most max_cuda_dims<S> dimensions and 2^30 components, and
// rows that are some of the batch's, [first, first + rows): else cudaErrorInvalidValue.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

#include "total_correlation.h"

namespace bomkern {
namespace total_correlation {

// What a block's registers and shared memory hold of one row.
template <class S> constexpr int64_t max_cuda_dims = 8192 / int64_t(sizeof(S));

// Bytes that cuda_run() needs at `workspace` (16-byte aligned, uninitialised) on the current device.
template <class S> size_t cuda_workspace(const Forward<S>& a);

// Writes every output of `a`; none may be null.
template <class S> cudaError_t cuda_run(const Forward<S>& a, void* workspace, cudaStream_t stream);

// The same; depends on which gradients are wanted.
template <class S> size_t cuda_workspace(const Backward<S>& a);

// Writes every gradient of `a` that is not null.
template <class S> cudaError_t cuda_run(const Backward<S>& a, void* workspace, cudaStream_t stream);

extern template size_t cuda_workspace(const Forward<float>&);
extern template size_t cuda_workspace(const Forward<double>&);
extern template cudaError_t cuda_run(const Forward<float>&, void*, cudaStream_t);
extern template cudaError_t cuda_run(const Forward<double>&, void*, cudaStream_t);
extern template size_t cuda_workspace(const Backward<float>&);
extern template size_t cuda_workspace(const Backward<double>&);
extern template cudaError_t cuda_run(const Backward<float>&, void*, cudaStream_t);
extern template cudaError_t cuda_run(const Backward<double>&, void*, cudaStream_t);

}  // namespace total_correlation
}  // namespace bomkern
