// active_units on the GPU: which kernel, how many blocks, how the workspace is laid out.
#include "cuda.h"

#include "cuda_kernels.h"

namespace bomkern {
namespace active_units {
namespace cuda {
namespace {

template <class S> bool valid(const Inputs<S>& in) {
  return in.batch >= 2 && in.batch <= most_batch && in.dims >= 1;
}

template <class S, int W> struct ForwardPlan {
  ForwardLaunch<S> l{};
  int64_t blocks;
  size_t bytes;

  ForwardPlan(const Forward<S>& a, void* base) {
    static std::atomic<int> known[16];
    const int64_t places = resident_blocks(forward_kernel<S, W>, column_threads, column_shared<S, W>, known);
    l.a = a;
    l.tiling = merging_tiling_of(a.in.batch, a.in.dims, W);
    blocks = least(l.tiling.tiles * l.tiling.slices, places);
    Memory memory(base);
    l.parts = memory.take<S>(2 * l.tiling.slices * a.in.dims);
    l.arrived = memory.take<unsigned>(1);
    bytes = memory.bytes();
  }
};

template <class S> int width_for(const Inputs<S>& in) { return width_of<S>(in.batch, in.dims, {in.mu}); }

template <class S> size_t workspace(const Forward<S>& a) {
  size_t bytes = 0;
  if (!valid(a.in)) return 0;
  with_width<S>(width_for(a.in), [&](auto w) {
    return bytes = ForwardPlan<S, decltype(w)::value>(a, nullptr).bytes, cudaSuccess;
  });
  return bytes;
}

template <class S> cudaError_t run(const Forward<S>& a, void* base, cudaStream_t stream) {
  if (!valid(a.in) || base == nullptr) return cudaErrorInvalidValue;
  return with_width<S>(width_for(a.in), [&](auto w) {
    constexpr int W = decltype(w)::value;
    const ForwardPlan<S, W> plan(a, base);
    return start(forward_kernel<S, W>, plan.blocks, column_threads, column_shared<S, W>, plan.blocks > 1, stream, plan.l);
  });
}

template <class S> size_t workspace(const Backward<S>&) { return 0; }

template <class S> cudaError_t run(const Backward<S>& a, void*, cudaStream_t stream) {
  if (a.grad_mu == nullptr) return cudaSuccess;
  if (!valid(a.in)) return cudaErrorInvalidValue;
  const int width = width_of<S>(a.in.batch, a.in.dims, {a.in.mu, contiguous(a.grad_mu, a.in.mu.dtype, a.in.dims)});
  return with_width<S>(width, [&](auto w) {
    constexpr int W = decltype(w)::value;
    static std::atomic<int> known[16];
    // A block first adds up all variances: no more blocks than are at work at once.
    const int64_t places = resident_blocks(backward_kernel<S, W>, column_threads, column_shared<S, W>, known);
    const BackwardLaunch<S> l{a, tiling_of(a.in.batch, a.in.dims, W, places)};
    return start(backward_kernel<S, W>, least(l.tiling.tiles * l.tiling.slices, places), column_threads,
                 column_shared<S, W>, false, stream, l);
  });
}

}  // namespace
}  // namespace cuda

BOMKERN_CUDA_OP

}  // namespace active_units
}  // namespace bomkern
