// Launches an op's kernels on the CPU or the GPU: workspace, threads, stream, errors.
#pragma once
#include "../kernels/common/parallel.h"
#include "op.h"

#include <atomic>

namespace bomkern {

inline Matrix describe(const Tensor& x) {
  return {x.const_data_ptr(), {x.stride(0), x.stride(1)}, dtype_of(x.scalar_type())};
}

template <class S> RowGrad<S> describe_grad(const Tensor& grad) {
  return {grad.const_data_ptr<S>(), grad.stride(0)};
}

// Each thread takes the next free task, so a slower thread takes fewer.
inline void run_tasks(int64_t tasks, void (*run)(void*, int64_t), void* state) {
  std::atomic<int64_t> next{0};
  const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };  // it orders no other memory
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t task = take(); task < tasks; task = take()) run(state, task);
  });
}

// Launches the kernels for `a`, an op's Forward or Backward. On the CPU `kernels` is the result of the op's cpu_kernels().
// On the GPU this calls cuda_workspace() and cuda_run() of the op's cuda.h, which the caller includes.
template <bool Cuda, class Kernels, class Arguments>
void launch([[maybe_unused]] const char* op, const Kernels& kernels, const Arguments& a, const Tensor& like) {
  const auto bytes = like.options().dtype(at::kByte);
  if constexpr (Cuda) {
#ifdef BOMKERN_CUDA
    const c10::cuda::CUDAGuard guard(like.device());
    const auto size = static_cast<int64_t>(cuda_workspace(a));
    const Tensor workspace = size ? at::empty({size}, bytes) : Tensor();
    const auto error = cuda_run(a, size ? workspace.mutable_data_ptr() : nullptr, c10::cuda::getCurrentCUDAStream().stream());
    TORCH_CHECK(error == cudaSuccess, op, ": the CUDA launch failed: ", cudaGetErrorString(error));
#endif
  } else {
    const int64_t size = kernels.bytes(a);
    const Tensor workspace = size ? cpu_empty({size}, bytes) : Tensor();
    kernels.run(a, size ? workspace.mutable_data_ptr() : nullptr, run_tasks);
  }
}

}  // namespace bomkern
