// covariance_penalty's GPU kernels that go along the rows of matrix products.
#pragma once
#include "../common/cuda_rows.h"

#include "cuda_columns.h"

namespace bomkern {
namespace covariance_penalty {
namespace cuda {

template <class S> struct GramLaunch {
  Gram<S> a;
  Teams teams;
  double* parts;  // [blocks]; null where no sum is wanted
};

template <class S, int W>
__global__ void __launch_bounds__(long_row_threads, 1) gram_kernel(const __grid_constant__ GramLaunch<S> l) {
  BOMKERN_SHARED_BYTES(bytes);
  const Gram<S>& a = l.a;
  const Member m(l.teams);
  const int64_t step = int64_t(gridDim.x) * m.teams;
  Sum<S> sum;
  for (int64_t row = int64_t(blockIdx.x) * m.teams + m.team; row < a.side; row += step) {
#pragma unroll 2
    for (int64_t p = m.lane; p < a.side / W; p += l.teams.lanes) {
      const int64_t at = row * a.side + p * W;
      S v[W], squares = 0;
      load_piece<S, W>(a.matrix, at, v);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        // A NaN stays: of one column there is nothing else that it would show in.
        v[i] = a.offdiagonal && p * W + i == row && v[i] == v[i] ? S(0) : a.scale * v[i];
        squares = fma_of(v[i], v[i], squares);
      }
      if (a.offdiagonal) store_piece<S, W>(a.matrix, at, v);
      sum.add(squares);
    }
  }
  if (l.parts == nullptr) return;
  const double own = block_sum(sum.value(), bytes);
  if (threadIdx.x == 0) l.parts[blockIdx.x] = own;
  grid_sync();
  if (blockIdx.x != 0) return;
  double all = 0;
  for (int i = threadIdx.x; i < int(gridDim.x); i += blockDim.x) all += l.parts[i];
  Sum<S> spread;
  for (int64_t d = threadIdx.x; a.spread && d < a.dims; d += blockDim.x) spread.add(a.spread[d] * a.spread[d]);
  const double total = block_sum(all - spread.value(), bytes);
  if (threadIdx.x == 0) *a.out = S(total * double(a.share));
}

template <class S> struct PartsLaunch {
  Parts<S> a;
  Teams teams;
};

template <class S, int W>
__global__ void __launch_bounds__(long_row_threads, 1) parts_kernel(const __grid_constant__ PartsLaunch<S> l) {
  BOMKERN_SHARED_BYTES(bytes);
  const Parts<S>& a = l.a;
  const Member m(l.teams);
  const int64_t step = int64_t(gridDim.x) * m.teams;
  for (int64_t first = int64_t(blockIdx.x) * m.teams; first < a.batch; first += step) {
    const int64_t b = first + m.team;
    const bool inside = b < a.batch;
    Sum<S> sum;
#pragma unroll 2
    for (int64_t p = m.lane; p < (inside ? a.dims / W : 0); p += l.teams.lanes) {
      const int64_t at = b * a.dims + p * W;
      S x[W], y[W], part = 0;
      load_piece<S, W>(a.x, at, x);
      load_piece<S, W>(a.y, at, y);
      if (a.spread) {
#pragma unroll
        for (int i = 0; i < W; ++i) y[i] = fma_of(a.scale, y[i], -a.spread[p * W + i] * x[i]);
        store_piece<S, W>(a.y, at, y);
      }
#pragma unroll
      for (int i = 0; i < W; ++i) part = fma_of(x[i], y[i], part);
      sum.add(part);
    }
    const S total = team_sum(sum.rounded(), l.teams.lanes, reinterpret_cast<S*>(bytes));
    if (inside && m.lane == 0) a.out[b] = a.share * total;
  }
}

}  // namespace cuda
}  // namespace covariance_penalty
}  // namespace bomkern
