// gaussian_kl on the GPU: which kernel, and how the threads lie over the rows.
#include "cuda.h"

#include "cuda_kernels.h"

#include <numeric>

namespace bomkern {
namespace gaussian_kl {
namespace cuda {
namespace {

constexpr int64_t most_blocks = int64_t(1) << 30;  // of a row: they are counted in 32 bits
int64_t full_blocks = 4;  // of a multiprocessor, from which on the device is full

// Whether a block's dimensions see one another; where they do not, 0 times an infinite sum must not make NaN.
template <class S> bool correlated(const Inputs<S>& in) { return in.whole.shared != 0; }

template <class S> int64_t blocks_of(const Inputs<S>& in) { return correlated(in) ? ceil_div(in.dims, in.block) : 1; }

template <class S> bool valid(const Inputs<S>& in) {
  return in.batch >= 1 && in.batch <= most_batch && in.block >= 1 && in.block <= in.dims && blocks_of(in) <= most_blocks;
}

// Columns that a piece must divide: a row, or each block of it, of which the last ends where the row does.
template <class S> int64_t run_of(const Inputs<S>& in) { return correlated(in) ? std::gcd(in.block, in.dims) : in.dims; }

// The lanes of a row, and of one block of the prior among them.
template <class S, class Arguments> void share_out(Launch<Arguments>& l, const Inputs<S>& in, int width) {
  l.teams = teams_of(in.batch, in.dims / width, multiprocessors());
  l.unit = l.teams.lanes;
  l.blocks = int(blocks_of(in)), l.pieces = in.block / width, l.rest = in.dims / width - (l.blocks - 1) * l.pieces;
  if (correlated(in) && (l.teams.lanes <= 32 || l.pieces <= 1024))
    l.unit = power_of_2(l.pieces, l.teams.lanes < 32 ? l.teams.lanes : 32);
  l.unit_shift = log2_of(l.unit);
}

// No workspace.
template <class Arguments> size_t workspace(const Arguments&) { return 0; }

template <class S> cudaError_t run(const Forward<S>& a, void*, cudaStream_t stream) {
  if (!valid(a.in)) return cudaErrorInvalidValue;
  const bool blocks = correlated(a.in);
  const int width = width_of<S>(a.in.batch, run_of(a.in), {a.in.mu, a.in.logvar});
  Launch<Forward<S>> l{a};
  share_out(l, a.in, width);
  return with_width<S>(width, [&](auto w) {
    constexpr int W = decltype(w)::value;
    if (!blocks && l.teams.lanes <= 32) {
      // A team's rows at once are whole where the device is full all the same.
      const int64_t each = l.teams.threads / l.teams.lanes * rows_at_once<S, W>, full = multiprocessors() * full_blocks;
      const int64_t whole = ceil_div(a.in.batch, each);
      l.teams.blocks = least(l.teams.blocks, whole > full ? whole : full);
    }
    const auto kernel = blocks ? forward_kernel<S, W, true> : forward_kernel<S, W, false>;
    return start(kernel, l.teams.blocks, l.teams.threads, row_shared, false, stream, l);
  });
}

template <class S> cudaError_t run(const Backward<S>& a, void*, cudaStream_t stream) {
  if (a.grad_mu == nullptr && a.grad_logvar == nullptr) return cudaSuccess;
  if (!valid(a.in)) return cudaErrorInvalidValue;
  const bool blocks = correlated(a.in);
  const int width = width_of<S>(a.in.batch, run_of(a.in),
                                {a.in.mu, a.in.logvar, contiguous(a.grad_mu, a.in.mu.dtype, a.in.dims),
                                 contiguous(a.grad_logvar, a.in.logvar.dtype, a.in.dims)});
  Launch<Backward<S>> l{a};
  share_out(l, a.in, width);
  return with_width<S>(width, [&](auto w) {
    constexpr int W = decltype(w)::value;
    const auto kernel = blocks ? backward_kernel<S, W, true> : backward_kernel<S, W, false>;
    return start(kernel, l.teams.blocks, l.teams.threads, row_shared, false, stream, l);
  });
}

}  // namespace
}  // namespace cuda

BOMKERN_CUDA_OP

}  // namespace gaussian_kl
}  // namespace bomkern

// See cuda_tune.h.
BOMKERN_EXPORT int64_t bomkern_tune_gaussian_kl(const char* name, int64_t value) {
  using namespace bomkern::gaussian_kl::cuda;
  return tune({{"full_blocks", &full_blocks}}, name, value);
}
