// active_units' GPU kernels: the moments of mu's columns and what they say, and the gradient.
#pragma once
#include "cuda_units.h"

#include "active_units.h"

namespace bomkern {
namespace active_units {
namespace cuda {

template <class S> struct ForwardLaunch {
  Forward<S> a;
  Tiling tiling;
  S* parts;           // [2, slices, D]
  unsigned* arrived;  // one
};

template <class S, int W>
__global__ void __launch_bounds__(column_threads, 2) forward_kernel(const __grid_constant__ ForwardLaunch<S> l) {
  BOMKERN_SHARED_BYTES(bytes);
  const Inputs<S>& in = l.a.in;
  if (blockIdx.x == 0 && threadIdx.x == 0) *l.arrived = 0;
  moments_of<S, W>(in.mu, l.tiling, l.parts, bytes);
  grid_sync();
  const int64_t sets = l.tiling.sets, blocks = min(sets, int64_t(gridDim.x));
  if (blockIdx.x >= blocks) return;
  for (int64_t set = blockIdx.x; set < sets; set += blocks) {
    finish_moments(l.parts, l.tiling, set, bytes, [&](int64_t d, S mean, S square) {
      l.a.offset[d] = mean;
      l.a.variance[d] = square / S(in.batch - 1);
    });
  }
  if (!is_last_block(l.arrived, int(blocks), bytes)) return;
  write_units<S>({in.threshold, in.temperature, l.a.active, l.a.effective, l.a.variance}, in.dims, bytes);
}

template <class S> struct BackwardLaunch {
  Backward<S> a;
  Tiling tiling;
};

template <class S, int W>
__global__ void __launch_bounds__(column_threads, 2) backward_kernel(const __grid_constant__ BackwardLaunch<S> l) {
  BOMKERN_SHARED_BYTES(bytes);
  const Backward<S>& a = l.a;
  const Inputs<S>& in = a.in;
  const Tiling& t = l.tiling;
  const UnitsGradient<S> given{in.threshold, in.temperature, a.grad_active, a.grad_effective, a.variance};
  const Units<S> units(given, in.dims, bytes);
  const S scale = S(2) / S(in.batch - 1);
  for (int64_t index = blockIdx.x; index < t.tiles * t.slices; index += gridDim.x) {
    const Item<W> item(t, index);
    if (!item.inside) continue;
    MomentGradient<S, W> gradient;
    load<S, W>(in.mu, 0, item.column, gradient.first);
    load_vector<S, W>(a.offset, item.column, gradient.offset);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      gradient.constant[i] = 0;
      gradient.slope[i] = scale * units.slope(given, a.variance[item.column + i]);
    }
    for (int64_t row = item.first; row < item.end; row += chunk_rows<W> * item.groups) {
      const int n = item.rows_from(row);
      Chunk<W> chunk;
      chunk.fetch_from(in.mu, item, row, n);
#pragma unroll
      for (int j = 0; j < chunk_rows<W>; ++j) {
        if (j >= n) break;
        S v[W];
        widen<S, W>(chunk.row[j], in.mu.dtype, v);
#pragma unroll
        for (int i = 0; i < W; ++i) v[i] = gradient.of(v[i], i);
        store<S, W>(a.grad_mu, in.mu.dtype, (row + j * item.groups) * in.dims + item.column, v);
      }
    }
  }
}

}  // namespace cuda
}  // namespace active_units
}  // namespace bomkern
