// consistency_variance on the GPU: which kernel, and how the threads lie over the rows.
#include "cuda.h"

#include "cuda_kernels.h"

namespace bomkern {
namespace consistency_variance {
namespace cuda {
namespace {

template <class S> bool valid(const Inputs<S>& in) {
  return in.views >= 1 && in.views <= max_views && in.batch >= 1 && in.batch <= most_batch && in.dims >= 1;
}

// No workspace.
template <class Arguments> size_t workspace(const Arguments&) { return 0; }

template <class S> cudaError_t run(const Forward<S>& a, void*, cudaStream_t stream) {
  if (!valid(a.in)) return cudaErrorInvalidValue;
  const int width = width_of<S>(a.in.batch, a.in.dims, a.in.view, size_t(a.in.views));
  const Launch<Forward<S>> l{a, teams_of(a.in.batch, a.in.dims / width, multiprocessors())};
  return with_width<S>(width, [&](auto w) {
    constexpr int W = decltype(w)::value;
    const auto kernel = a.in.views <= few_views ? forward_kernel<S, W, few_views> : forward_kernel<S, W, many_views>;
    return start(kernel, l.teams.blocks, l.teams.threads, row_shared, false, stream, l);
  });
}

template <class S> cudaError_t run(const Backward<S>& a, void*, cudaStream_t stream) {
  if (!valid(a.in)) return cudaErrorInvalidValue;
  Matrix all[2 * max_views];
  bool wanted = false;
  for (int v = 0; v < a.in.views; ++v) {
    wanted |= a.out[v] != nullptr;
    all[2 * v] = a.in.view[v];
    all[2 * v + 1] = contiguous(a.out[v], a.in.view[v].dtype, a.in.dims);
  }
  if (!wanted) return cudaSuccess;
  const int width = width_of<S>(a.in.batch, a.in.dims, all, size_t(2 * a.in.views));
  const Launch<Backward<S>> l{a, teams_of(a.in.batch, a.in.dims / width, multiprocessors())};
  return with_width<S>(width, [&](auto w) {
    constexpr int W = decltype(w)::value;
    const auto kernel = a.in.views <= few_views ? backward_kernel<S, W, few_views> : backward_kernel<S, W, many_views>;
    return start(kernel, l.teams.blocks, l.teams.threads, 0, false, stream, l);
  });
}

}  // namespace
}  // namespace cuda

BOMKERN_CUDA_OP

}  // namespace consistency_variance
}  // namespace bomkern
