// latent_statistics on the GPU: which kernel, how many blocks, how the workspace is laid out.
#include "cuda.h"

#include <utility>

#include "cuda_backward.h"
#include "cuda_forward.h"

namespace bomkern {
namespace latent_statistics {
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
    const int64_t tiles = l.tiling.tiles, slices = l.tiling.slices;
    blocks = least(tiles * slices, places);
    Memory memory(base);
    l.z_parts = memory.take<S>(2 * slices * a.in.dims);
    l.mu_parts = memory.take<S>(2 * slices * a.in.dims);
    if (tiles > 1) l.row_parts = memory.take<S>(tiles * row_sums * a.in.batch);
    l.arrived = memory.take<unsigned>(1);
    bytes = memory.bytes();
  }
};

template <class S> int width_for(const Inputs<S>& in) {
  return width_of<S>(in.batch, in.dims, {in.z, in.mu, in.logvar});
}

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
  BackwardLaunch<S> l{};
  l.a = a;
  if (a.grad_z) l.kind[l.kinds++] = Kind::z;
  if (a.grad_mu) l.kind[l.kinds++] = Kind::mu;
  if (a.grad_logvar) l.kind[l.kinds++] = Kind::logvar;
  if (l.kinds == 0) return cudaSuccess;
  if (!valid(a.in)) return cudaErrorInvalidValue;
  // Only what is read and written counts.
  const auto pair = [&](const Matrix& x, void* to) {
    return to ? std::pair(x, contiguous(to, x.dtype, a.in.dims)) : std::pair(Matrix{}, Matrix{});
  };
  const auto [z, grad_z] = pair(a.in.z, a.grad_z);
  const auto [mu, grad_mu] = pair(a.in.mu, a.grad_mu);
  const auto [logvar, grad_logvar] = pair(a.in.logvar, a.grad_logvar);
  const int width = width_of<S>(a.in.batch, a.in.dims, {z, grad_z, mu, grad_mu, logvar, grad_logvar});
  return with_width<S>(width, [&](auto w) {
    constexpr int W = decltype(w)::value;
    static std::atomic<int> known[16];
    // A block of mu's first adds up all variances: no more blocks than are at work at once.
    const int64_t all = resident_blocks(backward_kernel<S, W>, column_threads, column_shared<S, W>, known);
    const int64_t places = all > l.kinds ? all / l.kinds : 1;
    l.tiling = tiling_of(a.in.batch, a.in.dims, W, places);
    return start(backward_kernel<S, W>, least(l.tiling.tiles * l.tiling.slices, places) * l.kinds, column_threads,
                 column_shared<S, W>, false, stream, l);
  });
}

}  // namespace
}  // namespace cuda

BOMKERN_CUDA_OP

}  // namespace latent_statistics
}  // namespace bomkern
