// How an op's kernels on an NVIDIA GPU are called: its cuda.h declares the functions, its cuda.cu defines them. No torch here.
//
// The GPU has compute capability 8.0 or later. All pointers are device memory of the current device; the caller sets the
// device guard. Launches are asynchronous on the stream, are safe in a CUDA graph, and share no state with one another.
// No output needs to be initialised. Two runs on the same kind of device give the same bits.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

// Inside the op's namespace, for a template of arguments such as Forward:
// - cuda_workspace(a) returns the bytes that cuda_run() needs on the current device at `workspace`, which is aligned to 16
//   bytes and uninitialised.
// - cuda_run(a, workspace, stream) launches the kernels.
#define BOMKERN_CUDA_DECLARE(Arguments)                                                  \
  size_t cuda_workspace(const Arguments<float>& a);                                      \
  size_t cuda_workspace(const Arguments<double>& a);                                     \
  cudaError_t cuda_run(const Arguments<float>& a, void* workspace, cudaStream_t stream); \
  cudaError_t cuda_run(const Arguments<double>& a, void* workspace, cudaStream_t stream);

// The same functions, from the templates cuda::workspace(a) and cuda::run(a, workspace, stream).
#define BOMKERN_CUDA_DEFINE(Arguments)                                                    \
  size_t cuda_workspace(const Arguments<float>& a) { return cuda::workspace(a); }         \
  size_t cuda_workspace(const Arguments<double>& a) { return cuda::workspace(a); }        \
  cudaError_t cuda_run(const Arguments<float>& a, void* workspace, cudaStream_t stream) { \
    return cuda::run(a, workspace, stream);                                               \
  }                                                                                       \
  cudaError_t cuda_run(const Arguments<double>& a, void* workspace, cudaStream_t stream) { \
    return cuda::run(a, workspace, stream);                                               \
  }

// Both passes of an op.
#define BOMKERN_CUDA_OP_DECLARE BOMKERN_CUDA_DECLARE(Forward) BOMKERN_CUDA_DECLARE(Backward)
#define BOMKERN_CUDA_OP BOMKERN_CUDA_DEFINE(Forward) BOMKERN_CUDA_DEFINE(Backward)
